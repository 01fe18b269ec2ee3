#!/bin/bash
# meta-llama/Llama-3.2-3B-Instruct: the values of its config.json.
# 1 GPU of 80 GB: TP=1 ./finetune.sh meta-llama/Llama-3.2-3B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-meta-llama/Llama-3.2-3B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --num-layers 28 --hidden-size 3072 --ffn-hidden-size 8192
  --num-attention-heads 24 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type rope --rotary-percent 1 --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 32
  --max-position-embeddings 131072 --seq-length 4096 --padded-vocab-size 128256 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
