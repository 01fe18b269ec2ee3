#!/bin/bash
# google/gemma-3-12b-it: the values of its config.json.
# The text part of the model; images are not read.
# 4 GPUs of 80 GB: TP=4 ./finetune.sh google/gemma-3-12b-it
HF_MODEL_CKPT="${HF_MODEL_CKPT:-google/gemma-3-12b-it}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --apply-layernorm-1p --geglu --disable-bias-linear
  --num-layers 48 --hidden-size 3840 --ffn-hidden-size 15360
  --num-attention-heads 16 --group-query-attention --num-query-groups 8 --kv-channels 256 --qk-layernorm
  --rotary-base-local 10000 --norm-placement pre_post --embedding-scale 61.96773353931867 --window-size '1023,0'
  --window-attn-skip-freq 6
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --rope-scaling '{"rope_type": "linear", "factor": 8.0}'
  --softmax-scale 0.0625
  --max-position-embeddings 131072 --seq-length 4096 --padded-vocab-size 262208 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
