#!/bin/bash
# meta-llama/Llama-3.1-8B-Instruct: the values of its config.json.
# 4 GPUs of 80 GB: TP=4 ./finetune.sh meta-llama/Llama-3.1-8B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-meta-llama/Llama-3.1-8B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
  --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type rope --rotary-percent 1 --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8
  --max-position-embeddings 131072 --seq-length 4096 --padded-vocab-size 128256 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
