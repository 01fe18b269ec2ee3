#!/bin/bash
# Generates text: MLM_MODEL_CKPT=... PROMPTS_PATH=prompts.jsonl ./generate.sh Qwen/Qwen3-0.6B
# Reads MLM_MODEL_CKPT (HF folder or Megatron checkpoint), else HF_MODEL_CKPT. Variables: conf/arguments.sh.
SCRIPT_DIR="$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")"
# shellcheck source=conf/arguments.sh
source "${SCRIPT_DIR}/conf/arguments.sh"

if [[ -n "${PROMPTS_PATH:-}" ]]; then PROMPTS=(--prompts-path "${PROMPTS_PATH}"); else PROMPTS=(); fi
exec "${LAUNCH[@]}" "${SCRIPT_DIR}/generate.py" "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" \
  --tokenizer-model "${TOKENIZER_MODEL}" --load "${MLM_MODEL_CKPT:-${HF_MODEL_CKPT}}" --finetune \
  --draft-length "${DRAFT_LEN:-0}" "${PROMPTS[@]}" "${EXTRA_ARGS[@]}"
