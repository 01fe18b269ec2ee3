#!/bin/bash
# Qwen/Qwen3-0.6B: the values of its config.json.
# 1 GPU of 80 GB: TP=1 ./finetune.sh Qwen/Qwen3-0.6B
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen3-0.6B}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --num-layers 28 --hidden-size 1024 --ffn-hidden-size 3072
  --num-attention-heads 16 --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --max-position-embeddings 40960 --seq-length 4096 --padded-vocab-size 151936 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
