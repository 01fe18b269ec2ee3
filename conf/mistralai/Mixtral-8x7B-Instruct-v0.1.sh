#!/bin/bash
# mistralai/Mixtral-8x7B-Instruct-v0.1: the values of its config.json.
# 16 GPUs of 80 GB: EP=8 PP=2 ./finetune.sh mistralai/Mixtral-8x7B-Instruct-v0.1
HF_MODEL_CKPT="${HF_MODEL_CKPT:-mistralai/Mixtral-8x7B-Instruct-v0.1}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
  --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
  --position-embedding-type rope --rotary-percent 1 --rotary-base 1000000
  --moe-aux-loss-coeff 0.02 --moe-ffn-hidden-size 14336 --moe-router-topk 2 --num-experts 8
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type aux_loss
  --max-position-embeddings 32768 --seq-length 4096 --padded-vocab-size 32000 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
