#!/bin/bash
# nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16: the values of its config.json.
# Mamba layers in plain torch, slower than the CUDA kernels of mamba-ssm, which are not used; no CP.
# 64 GPUs of 80 GB: EP=32 PP=2 ./finetune.sh nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16
HF_MODEL_CKPT="${HF_MODEL_CKPT:-nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --squared-relu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 88 --hidden-size 4096 --ffn-hidden-size 2688
  --num-attention-heads 32 --group-query-attention --num-query-groups 2 --kv-channels 128
  --position-embedding-type none
  --hybrid-layer-pattern 'MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME'
  --mamba-head-dim 64 --mamba-num-groups 8 --mamba-num-heads 128 --mamba-state-dim 128
  --moe-ffn-hidden-size 2688 --moe-latent-size 1024 --moe-router-enable-expert-bias
  --moe-router-score-function sigmoid --moe-router-topk 22 --moe-router-topk-scaling-factor 5
  --moe-shared-expert-intermediate-size 5376 --num-experts 512
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
  --max-position-embeddings 262144 --seq-length 4096 --padded-vocab-size 131072 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
