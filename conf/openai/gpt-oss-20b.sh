#!/bin/bash
# openai/gpt-oss-20b: the values of its config.json.
# Published in MXFP4: train from a bf16 copy (docs/models.md).
# 8 GPUs of 80 GB: EP=8 ./finetune.sh openai/gpt-oss-20b
HF_MODEL_CKPT="${HF_MODEL_CKPT:-openai/gpt-oss-20b}"
# shellcheck disable=SC2034  # read by arguments.sh
MODEL_ARGS=(
  --bf16 --normalization RMSNorm --norm-epsilon 1e-5 --quick-geglu --add-bias-linear
  --untie-embeddings-and-output-weights
  --num-layers 24 --hidden-size 2880 --ffn-hidden-size 2880
  --num-attention-heads 64 --group-query-attention --num-query-groups 8 --kv-channels 64 --window-size '127,0'
  --window-attn-skip-freq 2
  --position-embedding-type yarn --rotary-percent 1 --rotary-base 150000
  --rope-scaling '{"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": false}'
  --activation-func-clamp-value 7 --glu-linear-offset 1 --softmax-type learnable
  --moe-ffn-hidden-size 2880 --moe-router-topk 4 --num-experts 32
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --sequence-parallel
  --moe-router-load-balancing-type aux_loss
  --max-position-embeddings 131072 --seq-length 4096 --padded-vocab-size 201088 --make-vocab-size-divisible-by 1
  --tokenizer-type HuggingFaceTokenizer
)
