#!/bin/bash
# Writes a Megatron checkpoint from an HF folder: HF_MODEL_CKPT=... MLM_MODEL_SAVE=... ./convert.sh Qwen/Qwen3-0.6B
# With MLM_MODEL_CKPT set, that checkpoint is re-sharded. Variables: conf/arguments.sh.
SCRIPT_DIR="$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")"
# shellcheck source=conf/arguments.sh
source "${SCRIPT_DIR}/conf/arguments.sh"

exec "${LAUNCH[@]}" -m megatron_sft convert "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" \
  --tokenizer-model "${TOKENIZER_MODEL}" --load "${MLM_MODEL_CKPT:-${HF_MODEL_CKPT}}" \
  --save "${MLM_MODEL_SAVE:-${MLM_WORK_DIR}/${MLM_MODEL_CFG}_mlm}" "${EXTRA_ARGS[@]}"
