#!/bin/bash
# allenai/OLMo-2-1124-7B-Instruct: the values of its config.json.
# 4 GPUs of 80 GB: TP=4 ./finetune.sh allenai/OLMo-2-1124-7B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-allenai/OLMo-2-1124-7B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008
  --num-attention-heads 32 --group-query-attention --num-query-groups 32 --kv-channels 128 --qk-layernorm
  --norm-placement post --qk-layernorm-full
  --position-embedding-type rope --rotary-percent 1 --rotary-base 500000
  --max-position-embeddings 4096 --seq-length 4096 --padded-vocab-size 100352 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
