#!/bin/bash
# allenai/OLMo-2-1124-13B-Instruct: the values of its config.json.
# 8 GPUs of 80 GB: TP=8 ./finetune.sh allenai/OLMo-2-1124-13B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-allenai/OLMo-2-1124-13B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 40 --hidden-size 5120 --ffn-hidden-size 13824
  --num-attention-heads 40 --group-query-attention --num-query-groups 40 --kv-channels 128 --qk-layernorm
  --norm-placement post --qk-layernorm-full
  --position-embedding-type rope --rotary-percent 1 --rotary-base 500000
  --max-position-embeddings 4096 --seq-length 4096 --padded-vocab-size 100352 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
