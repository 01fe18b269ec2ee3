#!/bin/bash
# meta-llama/Llama-4-Maverick-17B-128E-Instruct: the values of its config.json.
# The text part of the model; images are not read.
# 256 GPUs of 80 GB: EP=64 PP=4 ./finetune.sh meta-llama/Llama-4-Maverick-17B-128E-Instruct
HF_MODEL_CKPT="${HF_MODEL_CKPT:-meta-llama/Llama-4-Maverick-17B-128E-Instruct}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 48 --hidden-size 5120 --ffn-hidden-size 16384
  --num-attention-heads 40 --group-query-attention --num-query-groups 8 --kv-channels 128 --attention-chunk-size 8192
  --attn-temperature-scale 0.1
  --position-embedding-type rope --rotary-percent 1 --rotary-base 500000
  --no-rope-freq '[0,0,0,1]*12' --rotary-interleaved
  --moe-apply-probs-on-input --moe-ffn-hidden-size 8192 --moe-layer-freq '[0,1]*24'
  --moe-router-score-function sigmoid --moe-router-topk 1 --moe-shared-expert-intermediate-size 8192 --num-experts 128
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type aux_loss
  --max-position-embeddings 1048576 --seq-length 4096 --padded-vocab-size 202048 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
