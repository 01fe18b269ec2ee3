#!/bin/bash
# Qwen/Qwen2.5-14B-Instruct: the values of its config.json.
# 8 GPUs of 80 GB: TP=8 ./finetune.sh Qwen/Qwen2.5-14B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen2.5-14B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 48 --hidden-size 5120 --ffn-hidden-size 13824
  --num-attention-heads 40 --group-query-attention --num-query-groups 8 --kv-channels 128 --add-qkv-bias
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --max-position-embeddings 32768 --seq-length 4096 --padded-vocab-size 152064 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
