#!/bin/bash
# microsoft/Phi-3-mini-4k-instruct: the values of its config.json.
# 2 GPUs of 80 GB: TP=2 ./finetune.sh microsoft/Phi-3-mini-4k-instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-microsoft/Phi-3-mini-4k-instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 32 --hidden-size 3072 --ffn-hidden-size 8192
  --num-attention-heads 32 --group-query-attention --num-query-groups 32 --kv-channels 96 --window-size '2046,0'
  --position-embedding-type rope --rotary-percent 1 --rotary-base 10000
  --max-position-embeddings 4096 --seq-length 4096 --padded-vocab-size 32064 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
