#!/bin/bash
# HuggingFaceTB/SmolLM2-1.7B-Instruct: the values of its config.json.
# 1 GPU of 80 GB: TP=1 ./finetune.sh HuggingFaceTB/SmolLM2-1.7B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-HuggingFaceTB/SmolLM2-1.7B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --num-layers 24 --hidden-size 2048 --ffn-hidden-size 8192
  --num-attention-heads 32 --group-query-attention --num-query-groups 32 --kv-channels 64
  --position-embedding-type rope --rotary-percent 1 --rotary-base 130000
  --max-position-embeddings 8192 --seq-length 4096 --padded-vocab-size 49152 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
