#!/bin/bash
# Qwen/Qwen2.5-0.5B-Instruct: the values of its config.json.
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen2.5-0.5B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope --rotary-percent 1.0
  --num-layers 24 --hidden-size 896 --ffn-hidden-size 4864 --add-qkv-bias
  --num-attention-heads 14 --group-query-attention --num-query-groups 2 --kv-channels 64
  --norm-epsilon 1e-6 --rotary-base 1000000 --max-position-embeddings 32768 --seq-length 4096
  --make-vocab-size-divisible-by 1 --tokenizer-type HuggingFaceTokenizer
)
