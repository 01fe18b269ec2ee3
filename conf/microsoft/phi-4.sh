#!/bin/bash
# microsoft/phi-4: the values of its config.json.
# 8 GPUs of 80 GB: TP=2 PP=4 ./finetune.sh microsoft/phi-4
HF_MODEL_CKPT="${HF_MODEL_CKPT:-microsoft/phi-4}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 40 --hidden-size 5120 --ffn-hidden-size 17920
  --num-attention-heads 40 --group-query-attention --num-query-groups 10 --kv-channels 128
  --position-embedding-type rope --rotary-percent 1 --rotary-base 250000
  --max-position-embeddings 16384 --seq-length 4096 --padded-vocab-size 100352 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
