#!/bin/bash
# Scores MMLU: MLM_MODEL_CKPT=... MLM_EXTRA_ARGS="--fraction 0.05 --lower-bound 0.3" ./mmlu.sh Qwen/Qwen3-0.6B
# Reads MLM_MODEL_CKPT (HF folder or Megatron checkpoint), else HF_MODEL_CKPT. Variables: conf/arguments.sh.
SCRIPT_DIR="$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")"
# shellcheck source=conf/arguments.sh
source "${SCRIPT_DIR}/conf/arguments.sh"

exec "${LAUNCH[@]}" -m megatron_sft mmlu "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" \
  --tokenizer-model "${TOKENIZER_MODEL}" --load "${MLM_MODEL_CKPT:-${HF_MODEL_CKPT}}" --finetune "${EXTRA_ARGS[@]}"
