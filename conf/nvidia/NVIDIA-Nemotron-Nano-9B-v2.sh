#!/bin/bash
# nvidia/NVIDIA-Nemotron-Nano-9B-v2: the values of its config.json.
# Mamba layers in plain torch, slower than the CUDA kernels of mamba-ssm, which are not used; no CP.
# 4 GPUs of 80 GB: TP=4 ./finetune.sh nvidia/NVIDIA-Nemotron-Nano-9B-v2
HF_MODEL_CKPT="${HF_MODEL_CKPT:-nvidia/NVIDIA-Nemotron-Nano-9B-v2}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --squared-relu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 56 --hidden-size 4480 --ffn-hidden-size 15680
  --num-attention-heads 40 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type none
  --hybrid-layer-pattern 'M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-' --mamba-head-dim 80
  --mamba-num-groups 8 --mamba-num-heads 128 --mamba-state-dim 128
  --max-position-embeddings 131072 --seq-length 4096 --padded-vocab-size 131072 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
