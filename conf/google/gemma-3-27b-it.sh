#!/bin/bash
# google/gemma-3-27b-it: the values of its config.json.
# The text part of the model; images are not read.
# 16 GPUs of 80 GB: TP=8 PP=2 ./finetune.sh google/gemma-3-27b-it
HF_MODEL_CKPT="${HF_MODEL_CKPT:-google/gemma-3-27b-it}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --apply-layernorm-1p --geglu --disable-bias-linear
  --num-layers 62 --hidden-size 5376 --ffn-hidden-size 21504
  --num-attention-heads 32 --group-query-attention --num-query-groups 16 --kv-channels 128 --qk-layernorm
  --rotary-base-local 10000 --norm-placement pre_post --embedding-scale 73.32121111929344 --window-size '1023,0'
  --window-attn-skip-freq 6
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --rope-scaling '{"rope_type": "linear", "factor": 8.0}'
  --softmax-scale 0.07715167498104596
  --max-position-embeddings 131072 --seq-length 4096 --padded-vocab-size 262208 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
