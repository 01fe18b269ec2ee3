#!/bin/bash
# shellcheck disable=SC2034  # what is set here is read by the scripts that source it
# Environment variables -> command line, shared by the scripts of examples/post_training/modelopt. Sourced, not run.
#
#   $1 (MLM_MODEL_CFG)                    which conf is sourced; it sets HF_MODEL_CKPT and MODEL_ARGS:
#                                           Qwen/Qwen3-0.6B           conf/Qwen/Qwen3-0.6B.sh, never anything outside conf/
#                                           ./my.sh, /path/to/my.sh   that file: begins with / ./ or ../ and ends in .sh
#                                           ./model, /path/to/model   that HF folder: its config.json says the flags
#   $2 $3 ...                             flags, after all others, so that they win
#   TP PP CP EP ETP DP                    parallel sizes, whole numbers
#   LAUNCH_SCRIPT                         replaces the launcher; PYTHON: the interpreter
#   MLM_{DATA,OPTIM,TRAIN,EVAL,RESUME}_ARGS  each replaces one block of defaults of finetune.sh
#   MLM_EXTRA_ARGS                        comes after the other flags of a script, so that it wins
#   MLM_WORK_DIR                          where results go that no variable places
#   SANDBOX_ROOT                          confs come from its conf/model instead of conf/
#   SANDBOX_ENV_SETUP MLM_ENV_SETUP       files that are sourced first
#
# What is run: the conf (of an HF folder what `megatron-sft conf` makes of it), the two files above, PYTHON and LAUNCH_SCRIPT.
# No other value is: the MLM_*_ARGS are split as a shell splits a command line (quotes hold words together, nothing is
# expanded), numbers are checked before anything counts with them, and no module is imported from the folder where the script
# is called.
set -e

fail() {
  printf '%s: %s\n' "$0" "$*" >&2
  exit 2
}

# words NAME TEXT: splits TEXT into the array NAME.
words() {
  local -n target=$1
  target=()
  [[ $2 == *[![:space:]]* ]] || return 0
  mapfile -d '' -t target < <("${PYTHON}" -I -c '
import shlex, sys
try:
    words = shlex.split(sys.argv[1].replace("\\\n", " "))
except ValueError as error:
    sys.exit(f"{error}: {sys.argv[1]}")
sys.stdout.write("".join(word + "\0" for word in words))' "$2")
  wait $! || fail "an MLM_*_ARGS variable cannot be split into words. Check its quotes."
}

# require_numbers NAME...: each variable is a whole number from 1 to 99999. Before any arithmetic: bash runs what stands in
# the index of an array there, as in TP='x[$(command)]'.
require_numbers() {
  local name wrong=()
  for name in "$@"; do
    [[ ${!name} =~ ^[1-9][0-9]{0,4}$ ]] || wrong+=("${name}='${!name}'")
  done
  ((${#wrong[@]} == 0)) || fail "${wrong[*]}: expected whole numbers from 1 to 99999. Correct these variables."
}

# find_conf: sets `conf` to the file that MLM_MODEL_CFG names.
find_conf() {
  local folder=${SANDBOX_ROOT:+${SANDBOX_ROOT}/conf/model} name='[A-Za-z0-9_][A-Za-z0-9_.-]*'
  folder=$(realpath -- "${folder:-${SCRIPT_DIR}/conf}") || fail "SANDBOX_ROOT=${SANDBOX_ROOT} has no folder conf/model."
  local ways="expected a conf below ${folder}, such as Qwen/Qwen3-0.6B, or a file of your own as ./NAME.sh or /PATH/NAME.sh"
  ways+=", or an HF folder as ./FOLDER or /PATH/FOLDER"
  if [[ ${MLM_MODEL_CFG} =~ ^\.{0,2}/ && -d ${MLM_MODEL_CFG} ]]; then
    conf=$(realpath -- "${MLM_MODEL_CFG}")
    [[ -f ${conf}/config.json ]] || fail "${conf} has no config.json; ${ways}."
    MLM_MODEL_CFG=$(basename -- "${conf}")
    return
  fi
  if [[ ${MLM_MODEL_CFG} =~ ^\.{0,2}/.*\.sh$ ]]; then
    conf=${MLM_MODEL_CFG}
    MLM_MODEL_CFG=$(basename -- "${conf}" .sh)
    [[ -f ${conf} ]] || fail "${conf} does not exist; ${ways}."
    return
  fi
  if [[ -z ${MLM_MODEL_CFG} ]]; then
    local known=("${folder}"/*/*.sh)
    known=("${known[@]#"${folder}"/}")
    fail "no model named; expected one of: ${known[*]%.sh}"
  fi
  [[ ${MLM_MODEL_CFG} =~ ^${name}(/${name})*$ ]] || fail "'${MLM_MODEL_CFG}' is no name of a conf; ${ways}."
  conf=${folder}/${MLM_MODEL_CFG}.sh
  [[ -f ${conf} || ! -f ${MLM_MODEL_CFG}/config.json ]] ||
    fail "${MLM_MODEL_CFG} is no conf, but an HF folder here; expected a path. Write ./${MLM_MODEL_CFG} for it."
  [[ -f ${conf} ]] || fail "${conf} does not exist; ${ways}. 'megatron-sft conf FOLDER' writes one."
  conf=$(realpath -- "${conf}")
  [[ ${conf} == "${folder}"/* ]] || fail "${MLM_MODEL_CFG} leads to ${conf}; ${ways}."
}

# use_python: PYTHON is a program, which finds this package and nothing in the current folder.
use_python() {
  PYTHON="${PYTHON:-python3}"
  type -P -- "${PYTHON}" > /dev/null || fail "PYTHON=${PYTHON} is no program. Set it to a Python interpreter."
  "${PYTHON}" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null ||
    fail "PYTHON=${PYTHON} does not run as Python 3.11 or later. Name the interpreter that megatron-sft is installed in."
  local paths=":${PYTHONPATH:-}:"
  while [[ ${paths} == *::* ]]; do paths=${paths//::/:}; done # an empty entry is the current folder
  paths=${paths%:}
  if [[ -d ${SCRIPT_DIR}/../../../megatron_sft ]]; then # a checkout; in a wheel the package is where PYTHON looks anyhow
    paths=:${SCRIPT_DIR}/../../..${paths}
  fi
  export PYTHONPATH="${paths#:}" PYTHONSAFEPATH=1
}

[[ -n "${SCRIPT_DIR:-}" ]] || fail "SCRIPT_DIR is not set; expected the folder of the calling script."
for setup in "${SANDBOX_ENV_SETUP:-}" "${MLM_ENV_SETUP:-}"; do
  [[ -n ${setup} ]] || continue
  [[ ${setup} == */* ]] || setup=./${setup} # without a slash bash would look in PATH
  [[ -r ${setup} && ! -d ${setup} ]] || fail "${setup} cannot be read; expected a file that sets variables."
  # shellcheck source=/dev/null
  source "${setup}"
done
if [[ ${1:-} == -h || ${1:-} == --help* ]]; then
  use_python
  exec "${PYTHON}" -m megatron_sft "$(basename -- "$0" .sh)" "$1"
fi
export MLM_SCRIPT="$0" MLM_ARGUMENTS="${*@Q}" # for the commands that a run names at its end
MLM_MODEL_CFG="${1:-}"
find_conf

TP="${TP:-1}" PP="${PP:-1}" CP="${CP:-1}" EP="${EP:-1}" DP="${DP:-1}"
if [[ ! -d ${conf} ]]; then
  # shellcheck source=/dev/null
  source "${conf}"
fi
ETP="${ETP:-${TP}}"
require_numbers TP PP CP EP ETP DP
use_python
if [[ -d ${conf} ]]; then
  text=$("${PYTHON}" -m megatron_sft conf --load "${conf}") || exit
  # shellcheck source=/dev/null
  source /dev/stdin <<< "${text}"
fi
if [[ ${MODEL_ARGS@a} != *a* ]]; then
  words MODEL_ARGS "${MODEL_ARGS:-}"
fi
[[ -n "${HF_MODEL_CKPT:-}" ]] || fail "HF_MODEL_CKPT is not set, and ${conf} has no default. Set it to the HF folder."
TOKENIZER_MODEL="${TOKENIZER_MODEL:-${HF_MODEL_CKPT}}"
export MLM_WORK_DIR="${MLM_WORK_DIR:-/tmp/megatron_workspace}"
words EXTRA_ARGS "${MLM_EXTRA_ARGS:-}"
EXTRA_ARGS+=("${@:2}")

# Without experts in parallel TP is cut over PP x CP x DP; with them Megatron counts ETP x EP in its place.
PROCESSES=1
for size in $((EP == 1 ? TP : ETP * EP)) "${PP}" "${CP}" "${DP}"; do
  PROCESSES=$((PROCESSES * size))
  ((PROCESSES <= 999999)) || fail "TP=${TP} PP=${PP} CP=${CP} EP=${EP} ETP=${ETP} DP=${DP}: more than 999999 processes."
done
words LAUNCH "${LAUNCH_SCRIPT:-}"
if ((${#LAUNCH[@]})); then
  type -P -- "${LAUNCH[0]}" > /dev/null || fail "LAUNCH_SCRIPT=${LAUNCH_SCRIPT}: ${LAUNCH[0]} is no program. Check it."
elif ((PROCESSES == 1)); then
  LAUNCH=("${PYTHON}")
else
  LAUNCH=("${PYTHON}" -m megatron_sft.launch --standalone "--nproc_per_node=${PROCESSES}")
fi
if [[ -n ${MLM_DOCTOR:-} ]]; then # megatron-sft doctor CONF: the flags are looked at, nothing is started
  LAUNCH=("${PYTHON}" -m megatron_sft doctor --processes "${PROCESSES}")
fi
PARALLEL_ARGS=(
  --tensor-model-parallel-size "${TP}" --pipeline-model-parallel-size "${PP}" --context-parallel-size "${CP}"
  --expert-model-parallel-size "${EP}" --expert-tensor-parallel-size "${ETP}"
)

export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-False}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
if [[ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]]; then # the second name is the older one: torch warns of it
  export PYTORCH_ALLOC_CONF=expandable_segments:True                    # rows have many lengths: fixed segments fragment
fi
export NCCL_IB_SL="${NCCL_IB_SL:-1}" NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > PROCESSES ? cores / PROCESSES : 1))
fi
