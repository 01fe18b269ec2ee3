#!/bin/bash
# tests/gpu and bench/gpu.py on a CUDA machine that has this checkout and, without a network, a folder of wheels:
#
#   [WHEELS=folder] bench/gpu.sh first OUT_DIR    smoke tests and microbenchmarks: before anything else on a new machine
#   [WHEELS=folder] bench/gpu.sh OUT_DIR          tests/gpu and the table
#   bench/gpu.sh [first] --cpu OUT_DIR            the CPU form; also what runs where there is no CUDA
#
# Each is under ten minutes, unattended: every part has a time limit, and one that fails does not keep the next from running.
# `first` writes OUT_DIR/first/PART.json as each part ends and first.json; called again it goes on. Exit status: 0, 1 a part
# failed, 3 parts are left. The other writes OUT_DIR/gpu.json and the logs, in which every test and row stands as it ends.
# Exit status: 0, or 1 when a part failed. docs/gpu.md has the parts and the fields.
#
# PYTHON        an interpreter (default python3); one that has torch with CUDA already lends it
# BENCH_PYTHON  an interpreter that has everything: nothing is installed
# WHEELS        all wheels in it are installed as they are, nothing is fetched
# TESTS_S BENCH_S FIRST_S   seconds for the tests, the table and `first` (180, 360, 540)
# BENCH_ARGS FIRST_ARGS     further flags of bench/gpu.py and bench/gpu_first.py
set -uo pipefail

root=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..")
usage="usage: [WHEELS=folder] bench/gpu.sh [first] [--cpu] OUT_DIR"
cpu='' first=''
if [[ ${1:-} == first ]]; then
  first=1
  shift
fi
if [[ ${1:-} == --cpu ]]; then
  cpu=1
  shift
fi
if [[ $# -ne 1 || $1 == -* ]]; then
  echo "bench/gpu.sh: $# arguments: expected a folder for the results. $usage" >&2
  exit 2
fi
for limit in "${TESTS_S:=180}" "${BENCH_S:=360}" "${FIRST_S:=540}"; do # before any arithmetic, in which bash runs x[$(command)]
  if [[ ! $limit =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "bench/gpu.sh: '$limit' seconds: expected a whole number. Correct TESTS_S, BENCH_S or FIRST_S." >&2
    exit 2
  fi
done
read -ra bench_args <<<"${BENCH_ARGS:-}"
read -ra first_args <<<"${FIRST_ARGS:-}"
mkdir -p "$1" || exit 2
out=$(realpath -- "$1")
base=${PYTHON:-python3}
paths=":${PYTHONPATH:-}:"
while [[ $paths == *::* ]]; do paths=${paths//::/:}; done # an empty entry is the current folder
paths=${paths#:}
export PYTHONPATH=${paths%:} PYTHONSAFEPATH=1 # no module comes from the folder where this is called

# A virtual environment that sees the packages of the base interpreter, also when that is itself a virtual environment
# (--system-site-packages would then show those of the system).
make_environment() {
  "$base" -m venv --without-pip "$venv" || return
  local packages
  packages=$("$base" -c 'import site, sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))') || return
  echo "$packages" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  python=$venv/bin/python
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || return
  if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
  else
    "$python" -m pip install --quiet --editable "${root}[test]"
  fi
}

if [[ -n ${BENCH_PYTHON:-} ]]; then
  python=$(type -P -- "$BENCH_PYTHON") || {
    echo "bench/gpu.sh: BENCH_PYTHON=$BENCH_PYTHON is no program. Set it to a Python interpreter." >&2
    exit 2
  }
  python=$(realpath -- "$(dirname -- "$python")")/$(basename -- "$python") # itself a link in a virtual environment
else
  echo "== environment"
  venv=$(mktemp -d) || exit 1
  trap 'rm -rf "$venv"' EXIT
  if ! make_environment >"$out/install.log" 2>&1; then
    tail -20 "$out/install.log" >&2
    echo "bench/gpu.sh: $out/install.log: the environment was not made; expected pip to install every package. See its end above." >&2
    exit 1
  fi
fi

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
if [[ -z $cpu ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device: the CPU form"
  cpu=1
fi
if [[ -n $cpu ]]; then
  export CUDA_VISIBLE_DEVICES='' GPU_TESTS_ON_CPU=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
cd "$root" || exit 1

if [[ -n $first ]]; then
  echo "== bench/gpu_first.py"
  timeout --kill-after=10 "$((FIRST_S + 30))" "$python" bench/gpu_first.py --out "$out/first" --budget-seconds "$FIRST_S" \
    ${cpu:+--cpu} "${first_args[@]}"
  exit
fi

failed=0
echo "== tests/gpu"
rm -f "$out/gpu.json"
timeout --kill-after=10 "$TESTS_S" "$python" -m pytest tests/gpu -v --tb=short -p no:cacheprovider >"$out/tests.log" 2>&1
status=$?
tail -1 "$out/tests.log"
if [[ $status -ne 0 ]]; then
  grep -E '^(FAILED|ERROR)' "$out/tests.log"
  echo "tests/gpu ended with status $status; see $out/tests.log"
  failed=1
fi

echo "== bench/gpu.py"
timeout --kill-after=10 "$BENCH_S" "$python" bench/gpu.py --out "$out/gpu.json" --tests "$out/tests.log" --tests-status "$status" \
  --budget-seconds "$((BENCH_S * 9 / 10))" ${cpu:+--cpu} "${bench_args[@]}" 2>"$out/bench.log" || failed=1
tail -5 "$out/bench.log"
echo "results in $out/gpu.json"
exit "$failed"
