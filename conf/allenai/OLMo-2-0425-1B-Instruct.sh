#!/bin/bash
# allenai/OLMo-2-0425-1B-Instruct: the values of its config.json.
# 1 GPU of 80 GB: TP=1 ./finetune.sh allenai/OLMo-2-0425-1B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-allenai/OLMo-2-0425-1B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192
  --num-attention-heads 16 --group-query-attention --num-query-groups 16 --kv-channels 128 --qk-layernorm
  --norm-placement post --qk-layernorm-full
  --position-embedding-type rope --rotary-percent 1 --rotary-base 500000
  --max-position-embeddings 4096 --seq-length 4096 --padded-vocab-size 100352 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
