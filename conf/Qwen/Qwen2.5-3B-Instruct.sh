#!/bin/bash
# Qwen/Qwen2.5-3B-Instruct: the values of its config.json.
# 1 GPU of 80 GB: TP=1 ./finetune.sh Qwen/Qwen2.5-3B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen2.5-3B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --num-layers 36 --hidden-size 2048 --ffn-hidden-size 11008
  --num-attention-heads 16 --group-query-attention --num-query-groups 2 --kv-channels 128 --add-qkv-bias
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --max-position-embeddings 32768 --seq-length 4096 --padded-vocab-size 151936 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
