#!/bin/bash
# deepseek-ai/DeepSeek-V2-Lite: the values of its config.json.
# 8 GPUs of 80 GB: EP=8 ./finetune.sh deepseek-ai/DeepSeek-V2-Lite
HF_MODEL_CKPT="${HF_MODEL_CKPT:-deepseek-ai/DeepSeek-V2-Lite}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944
  --num-attention-heads 16 --group-query-attention --num-query-groups 16 --kv-channels 128 --qk-layernorm
  --position-embedding-type rope --rotary-percent 1 --rotary-base 10000
  --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
  --rope-type yarn --rotary-scaling-factor 40 --original-max-position-embeddings 4096 --beta-fast 32 --beta-slow 1
  --mscale 0.707 --mscale-all-dim 0.707
  --moe-ffn-hidden-size 1408 --moe-layer-freq '[0]*1+[1]*26' --moe-router-group-topk 1 --moe-router-num-groups 1
  --moe-router-pre-softmax --moe-router-topk 6 --moe-router-topk-scaling-factor 1
  --moe-shared-expert-intermediate-size 2816 --num-experts 64
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type aux_loss
  --max-position-embeddings 163840 --seq-length 4096 --padded-vocab-size 102400 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
