#!/bin/bash
# Qwen/Qwen3-32B: the values of its config.json.
# 16 GPUs of 80 GB: TP=8 PP=2 ./finetune.sh Qwen/Qwen3-32B
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen3-32B}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 64 --hidden-size 5120 --ffn-hidden-size 25600
  --num-attention-heads 64 --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --max-position-embeddings 40960 --seq-length 4096 --padded-vocab-size 151936 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
