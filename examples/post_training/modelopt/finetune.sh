#!/bin/bash
# Fine-tunes a model on conversations: TP=1 HF_MODEL_CKPT=... MLM_MODEL_SAVE=... DATASET=... ./finetune.sh Qwen/Qwen3-0.6B
# Starts from MLM_MODEL_CKPT (HF folder or Megatron checkpoint), else HF_MODEL_CKPT. Variables: conf/arguments.sh.
SCRIPT_DIR="$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")"
# shellcheck source=conf/arguments.sh
source "${SCRIPT_DIR}/conf/arguments.sh"

DATASET="${DATASET:-Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered}"
MLM_MODEL_CKPT="${MLM_MODEL_CKPT:-${HF_MODEL_CKPT}}"
MLM_MODEL_SAVE="${MLM_MODEL_SAVE:-${MLM_WORK_DIR}/${MLM_MODEL_CFG}_sft}"

# shellcheck disable=SC2054
DATA=(
  --train-samples 128000 --lr-decay-samples 128000 --lr-warmup-samples 0 --split 100,0,0
  --finetune-hf-dataset "${DATASET}"
)
OPTIM=(
  --lr 5.0e-5 --min-lr 1.0e-7 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.0
  --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.010 --use-distributed-optimizer
)
TRAIN=(
  --reset-position-ids --reset-attention-mask --eod-mask-loss --micro-batch-size 1
  --attention-dropout 0.0 --hidden-dropout 0.0
)
EVAL=(--eval-iters 1 --eval-interval 1000 --save-interval 1000 --log-interval 100)
if [[ -n "${MLM_DATA_ARGS:-}" ]]; then words DATA "${MLM_DATA_ARGS}"; fi
if [[ -n "${MLM_OPTIM_ARGS:-}" ]]; then words OPTIM "${MLM_OPTIM_ARGS}"; fi
if [[ -n "${MLM_TRAIN_ARGS:-}" ]]; then words TRAIN "${MLM_TRAIN_ARGS}"; fi
if [[ -n "${MLM_EVAL_ARGS:-}" ]]; then words EVAL "${MLM_EVAL_ARGS}"; fi
words RESUME "${MLM_RESUME_ARGS:-}"

exec "${LAUNCH[@]}" "${SCRIPT_DIR}/finetune.py" "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" \
  --tokenizer-model "${TOKENIZER_MODEL}" --load "${MLM_MODEL_CKPT}" --save "${MLM_MODEL_SAVE}" \
  "${DATA[@]}" "${OPTIM[@]}" "${TRAIN[@]}" "${EVAL[@]}" "${RESUME[@]}" \
  --distributed-timeout-minutes 30 --finetune "${EXTRA_ARGS[@]}"
