#!/bin/bash
# Scores tasks: MLM_MODEL_CKPT=... MLM_EXTRA_ARGS="--eval-tasks mmlu/chat-letter gsm8k/chat --output scores.json" ./eval.sh Qwen/Qwen3-0.6B
# Reads MLM_MODEL_CKPT (HF folder or Megatron checkpoint), else HF_MODEL_CKPT. Variables: conf/arguments.sh.
SCRIPT_DIR="$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")"
# shellcheck source=conf/arguments.sh
source "${SCRIPT_DIR}/conf/arguments.sh"

exec "${LAUNCH[@]}" -m megatron_sft eval "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" \
  --tokenizer-model "${TOKENIZER_MODEL}" --load "${MLM_MODEL_CKPT:-${HF_MODEL_CKPT}}" --finetune "${EXTRA_ARGS[@]}"
