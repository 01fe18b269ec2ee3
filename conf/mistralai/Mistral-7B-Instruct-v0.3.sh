#!/bin/bash
# mistralai/Mistral-7B-Instruct-v0.3: the values of its config.json.
# 4 GPUs of 80 GB: TP=4 ./finetune.sh mistralai/Mistral-7B-Instruct-v0.3
HF_MODEL_CKPT="${HF_MODEL_CKPT:-mistralai/Mistral-7B-Instruct-v0.3}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
  --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --max-position-embeddings 32768 --seq-length 4096 --padded-vocab-size 32768 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
