#!/bin/bash
# nvidia/Nemotron-H-56B-Base-8K: the values of its config.json.
# Mamba layers in plain torch, slower than the CUDA kernels of mamba-ssm, which are not used; no CP.
# 32 GPUs of 80 GB: TP=8 PP=2 DP=2 ./finetune.sh nvidia/Nemotron-H-56B-Base-8K
HF_MODEL_CKPT="${HF_MODEL_CKPT:-nvidia/Nemotron-H-56B-Base-8K}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --squared-relu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 118 --hidden-size 8192 --ffn-hidden-size 32768
  --num-attention-heads 64 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type none
  --hybrid-layer-pattern 'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-'
  --mamba-head-dim 64 --mamba-num-groups 8 --mamba-num-heads 256 --mamba-state-dim 256
  --max-position-embeddings 8192 --seq-length 4096 --padded-vocab-size 131072 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
