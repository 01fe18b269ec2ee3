#!/bin/bash
# deepseek-ai/DeepSeek-R1: the values of its config.json.
# Published in FP8: train from a bf16 copy (docs/models.md).
# 256 GPUs of 80 GB: EP=32 PP=8 ./finetune.sh deepseek-ai/DeepSeek-R1
# with MLM_EXTRA_ARGS='--decoder-first-pipeline-num-layers 6 --decoder-last-pipeline-num-layers 7'
HF_MODEL_CKPT="${HF_MODEL_CKPT:-deepseek-ai/DeepSeek-R1}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432
  --num-attention-heads 128 --group-query-attention --num-query-groups 128 --kv-channels 128 --qk-layernorm
  --position-embedding-type rope --rotary-percent 1 --rotary-base 10000
  --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
  --v-head-dim 128 --rope-type yarn --rotary-scaling-factor 40 --original-max-position-embeddings 4096 --beta-fast 32
  --beta-slow 1 --mscale 1 --mscale-all-dim 1
  --moe-ffn-hidden-size 2048 --moe-layer-freq '[0]*3+[1]*58' --moe-router-enable-expert-bias --moe-router-group-topk 4
  --moe-router-num-groups 8 --moe-router-pre-softmax --moe-router-score-function sigmoid --moe-router-topk 8
  --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 2048 --num-experts 256
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
  --max-position-embeddings 163840 --seq-length 4096 --padded-vocab-size 129280 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
