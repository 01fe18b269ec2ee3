#!/bin/bash
# Qwen/Qwen3-14B: the values of its config.json.
# 8 GPUs of 80 GB: TP=8 ./finetune.sh Qwen/Qwen3-14B
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen3-14B}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 40 --hidden-size 5120 --ffn-hidden-size 17408
  --num-attention-heads 40 --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --max-position-embeddings 40960 --seq-length 4096 --padded-vocab-size 151936 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
