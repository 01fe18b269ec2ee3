#!/bin/bash
# nvidia/Nemotron-Mini-4B-Instruct: the values of its config.json.
# 2 GPUs of 80 GB: TP=2 ./finetune.sh nvidia/Nemotron-Mini-4B-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-nvidia/Nemotron-Mini-4B-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization LayerNorm --norm-epsilon 1e-5 --apply-layernorm-1p --squared-relu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 32 --hidden-size 3072 --ffn-hidden-size 9216
  --num-attention-heads 24 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type rope --rotary-percent 0.5 --rotary-base 10000
  --max-position-embeddings 4096 --seq-length 4096 --padded-vocab-size 256000 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
