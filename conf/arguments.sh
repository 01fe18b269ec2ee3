#!/bin/bash
# shellcheck disable=SC2034  # what is set here is read by the scripts that source it
# Environment variables -> command line, shared by the scripts of examples/post_training/modelopt. Sourced, not run.
#
#   $1 (MLM_MODEL_CFG)                    conf/<org>/<model>.sh, which sets HF_MODEL_CKPT and MODEL_ARGS
#   TP PP CP EP ETP DP                    parallel sizes
#   LAUNCH_SCRIPT                         replaces the launcher; PYTHON: the interpreter
#   MLM_{DATA,OPTIM,TRAIN,EVAL,RESUME}_ARGS  each replaces one block of defaults of finetune.sh
#   MLM_EXTRA_ARGS                        comes last, so that it wins
#   MLM_WORK_DIR                          where results go that no variable places
#   SANDBOX_ENV_SETUP MLM_ENV_SETUP       files that are sourced first
#
# The MLM_*_ARGS are split as a shell splits a command line: quotes hold words together, nothing is expanded or run.
set -e

fail() {
  echo "$0: $*" >&2
  exit 2
}

# words NAME TEXT: splits TEXT into the array NAME.
words() {
  local -n target=$1
  target=()
  [[ $2 == *[![:space:]]* ]] || return 0
  mapfile -d '' -t target < <("${PYTHON}" -c '
import shlex, sys
try:
    words = shlex.split(sys.argv[1].replace("\\\n", " "))
except ValueError as error:
    sys.exit(f"{error}: {sys.argv[1]}")
sys.stdout.write("".join(word + "\0" for word in words))' "$2")
  wait $! || fail "an MLM_*_ARGS variable cannot be split into words. Check its quotes."
}

PYTHON="${PYTHON:-python3}"
[[ -n "${SCRIPT_DIR:-}" ]] || fail "SCRIPT_DIR is not set; expected the folder of the calling script."
MLM_MODEL_CFG="${1:-}"
CONF_DIR="${SCRIPT_DIR}/conf"
if [[ -z "${MLM_MODEL_CFG}" ]]; then
  fail "no model named; expected one of: $(cd "${CONF_DIR}/" && echo */*.sh)"
fi
for setup in "${SANDBOX_ENV_SETUP:-}" "${MLM_ENV_SETUP:-}"; do
  # shellcheck source=/dev/null
  if [[ -n "${setup}" ]]; then source "${setup}"; fi
done
conf="${SANDBOX_ROOT:+${SANDBOX_ROOT}/conf/model}"
conf="${conf:-${CONF_DIR}}/${MLM_MODEL_CFG}.sh"
[[ -f "${conf}" ]] || fail "${conf} does not exist; expected a conf such as Qwen/Qwen3-0.6B. 'megatron-sft conf FOLDER' writes one."

TP="${TP:-1}" PP="${PP:-1}" CP="${CP:-1}" EP="${EP:-1}" DP="${DP:-1}"
# shellcheck source=/dev/null
source "${conf}"
ETP="${ETP:-${TP}}"
if ! declare -p MODEL_ARGS 2> /dev/null | grep -q '^declare -a'; then
  words MODEL_ARGS "${MODEL_ARGS:-}"
fi
[[ -n "${HF_MODEL_CKPT:-}" ]] || fail "HF_MODEL_CKPT is not set, and ${conf} has no default. Set it to the HF folder."
TOKENIZER_MODEL="${TOKENIZER_MODEL:-${HF_MODEL_CKPT}}"
export MLM_WORK_DIR="${MLM_WORK_DIR:-/tmp/megatron_workspace}"
words EXTRA_ARGS "${MLM_EXTRA_ARGS:-}"

# Without experts in parallel TP is cut over PP x CP x DP; with them Megatron counts ETP x EP in its place.
if ((EP == 1)); then
  PROCESSES=$((TP * PP * CP * DP))
else
  PROCESSES=$((ETP * EP * PP * CP * DP))
fi
if [[ -n "${LAUNCH_SCRIPT:-}" ]]; then
  words LAUNCH "${LAUNCH_SCRIPT}"
elif ((PROCESSES == 1)); then
  LAUNCH=("${PYTHON}")
else
  LAUNCH=("${PYTHON}" -m torch.distributed.run --standalone "--nproc_per_node=${PROCESSES}")
fi
PARALLEL_ARGS=(
  --tensor-model-parallel-size "${TP}" --pipeline-model-parallel-size "${PP}" --context-parallel-size "${CP}"
  --expert-model-parallel-size "${EP}" --expert-tensor-parallel-size "${ETP}"
)

export PYTHONPATH="${SCRIPT_DIR}/../../..${PYTHONPATH:+:${PYTHONPATH}}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-False}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export NCCL_IB_SL="${NCCL_IB_SL:-1}" NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > PROCESSES ? cores / PROCESSES : 1))
fi
