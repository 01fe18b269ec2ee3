#!/bin/bash
# google/gemma-2-2b-it: the values of its config.json.
# 1 GPU of 80 GB: TP=1 ./finetune.sh google/gemma-2-2b-it
HF_MODEL_CKPT="${HF_MODEL_CKPT:-google/gemma-2-2b-it}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --apply-layernorm-1p --geglu --disable-bias-linear
  --num-layers 26 --hidden-size 2304 --ffn-hidden-size 9216
  --num-attention-heads 8 --group-query-attention --num-query-groups 4 --kv-channels 256 --norm-placement pre_post
  --embedding-scale 48 --attn-logit-softcapping 50 --final-logit-softcapping 30 --window-size '4095,0'
  --window-attn-skip-freq 2
  --position-embedding-type rope --rotary-percent 1 --rotary-base 10000
  --softmax-scale 0.0625
  --max-position-embeddings 8192 --seq-length 4096 --padded-vocab-size 256000 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
