#!/bin/bash
# Writes an HF folder from a Megatron checkpoint: MLM_MODEL_CKPT=... EXPORT_DIR=... ./export.sh Qwen/Qwen3-0.6B
# config.json, tokenizer and dtypes come from HF_MODEL_CKPT. Variables: conf/arguments.sh.
SCRIPT_DIR="$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")"
# shellcheck source=conf/arguments.sh
source "${SCRIPT_DIR}/conf/arguments.sh"

[[ -n "${MLM_MODEL_CKPT:-}" ]] || fail "MLM_MODEL_CKPT is not set; expected the Megatron checkpoint to export."
exec "${LAUNCH[@]}" -m megatron_sft export "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" \
  --tokenizer-model "${TOKENIZER_MODEL}" --load "${MLM_MODEL_CKPT}" \
  --save-hf "${EXPORT_DIR:-${MLM_WORK_DIR}/${MLM_MODEL_CFG}_export}" "${EXTRA_ARGS[@]}"
