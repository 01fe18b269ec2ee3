#!/bin/bash
# Qwen/Qwen3-30B-A3B: the values of its config.json.
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen3-30B-A3B}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope --rotary-percent 1.0
  --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144
  --num-attention-heads 32 --group-query-attention --num-query-groups 4 --kv-channels 128 --qk-layernorm
  --untie-embeddings-and-output-weights
  --num-experts 128 --moe-ffn-hidden-size 768 --moe-router-topk 8 --moe-router-dtype fp32
  --moe-aux-loss-coeff 1e-3 --moe-router-load-balancing-type aux_loss --moe-token-dispatcher-type alltoall
  --norm-epsilon 1e-6 --rotary-base 1000000 --max-position-embeddings 40960 --seq-length 4096
  --make-vocab-size-divisible-by 1187 --tokenizer-type HuggingFaceTokenizer
)
