#!/bin/bash
# Qwen/Qwen3-30B-A3B: the values of its config.json.
# 16 GPUs of 80 GB: EP=16 ./finetune.sh Qwen/Qwen3-30B-A3B
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen3-30B-A3B}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144
  --num-attention-heads 32 --group-query-attention --num-query-groups 4 --kv-channels 128 --qk-layernorm
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --moe-aux-loss-coeff 0.001 --moe-ffn-hidden-size 768 --moe-router-topk 8 --num-experts 128
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type aux_loss
  --max-position-embeddings 40960 --seq-length 4096 --padded-vocab-size 151936 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
