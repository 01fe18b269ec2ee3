#!/bin/bash
# nvidia/Nemotron-H-4B-Instruct: the values of its config.json.
# Mamba layers in plain torch, slower than the CUDA kernels of mamba-ssm, which are not used; no CP.
# 2 GPUs of 80 GB: TP=2 ./finetune.sh nvidia/Nemotron-H-4B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-nvidia/Nemotron-H-4B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --squared-relu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 52 --hidden-size 3072 --ffn-hidden-size 12288
  --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type none
  --hybrid-layer-pattern 'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-' --mamba-head-dim 64
  --mamba-num-groups 8 --mamba-num-heads 112 --mamba-state-dim 128
  --max-position-embeddings 8192 --seq-length 4096 --padded-vocab-size 131072 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
