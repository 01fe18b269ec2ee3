#!/bin/bash
# nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16: the values of its config.json.
# Mamba layers in plain torch, slower than the CUDA kernels of mamba-ssm, which are not used; no CP.
# 16 GPUs of 80 GB: EP=16 ./finetune.sh nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
HF_MODEL_CKPT="${HF_MODEL_CKPT:-nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --squared-relu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 52 --hidden-size 2688 --ffn-hidden-size 1856
  --num-attention-heads 32 --group-query-attention --num-query-groups 2 --kv-channels 128
  --position-embedding-type none
  --hybrid-layer-pattern 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME' --mamba-head-dim 64
  --mamba-num-groups 8 --mamba-num-heads 64 --mamba-state-dim 128
  --moe-ffn-hidden-size 1856 --moe-router-enable-expert-bias --moe-router-score-function sigmoid --moe-router-topk 6
  --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 3712 --num-experts 128
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
  --max-position-embeddings 262144 --seq-length 4096 --padded-vocab-size 131072 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
