#!/bin/bash
# Qwen/Qwen3-235B-A22B: the values of its config.json.
# 128 GPUs of 80 GB: EP=16 PP=8 ./finetune.sh Qwen/Qwen3-235B-A22B
# with MLM_EXTRA_ARGS='--decoder-first-pipeline-num-layers 11 --decoder-last-pipeline-num-layers 11'
HF_MODEL_CKPT="${HF_MODEL_CKPT:-Qwen/Qwen3-235B-A22B}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 94 --hidden-size 4096 --ffn-hidden-size 12288
  --num-attention-heads 64 --group-query-attention --num-query-groups 4 --kv-channels 128 --qk-layernorm
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --moe-aux-loss-coeff 0.001 --moe-ffn-hidden-size 1536 --moe-router-topk 8 --num-experts 128
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type aux_loss
  --max-position-embeddings 40960 --seq-length 4096 --padded-vocab-size 151936 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
