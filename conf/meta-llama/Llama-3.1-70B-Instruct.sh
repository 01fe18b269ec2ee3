#!/bin/bash
# meta-llama/Llama-3.1-70B-Instruct: the values of its config.json.
# 32 GPUs of 80 GB: TP=8 PP=4 ./finetune.sh meta-llama/Llama-3.1-70B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-meta-llama/Llama-3.1-70B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672
  --num-attention-heads 64 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type rope --rotary-percent 1 --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8
  --max-position-embeddings 131072 --seq-length 4096 --padded-vocab-size 128256 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
