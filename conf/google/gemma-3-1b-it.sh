#!/bin/bash
# google/gemma-3-1b-it: the values of its config.json.
# 1 GPU of 80 GB: TP=1 ./finetune.sh google/gemma-3-1b-it
HF_MODEL_CKPT="${HF_MODEL_CKPT:-google/gemma-3-1b-it}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --apply-layernorm-1p --geglu --disable-bias-linear
  --num-layers 26 --hidden-size 1152 --ffn-hidden-size 6912
  --num-attention-heads 4 --group-query-attention --num-query-groups 1 --kv-channels 256 --qk-layernorm
  --rotary-base-local 10000 --norm-placement pre_post --embedding-scale 33.94112549695428 --window-size '511,0'
  --window-attn-skip-freq 6
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --softmax-scale 0.0625
  --max-position-embeddings 32768 --seq-length 4096 --padded-vocab-size 262144 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
