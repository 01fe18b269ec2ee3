"""Hostile values in every variable and argument of every shell script: 0 executions.

    PYTHONPATH=. python tests/soak/hostile_shell.py [all]

A value is hostile when a shell, an arithmetic expression, a search path or Python would run what it names. Each trial runs a
script in a folder of planted modules and programs, all of which leave a marker; the launcher only prints its arguments.
By default each variable meets each kind of value in one script that reads it; `all`: in every script.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "post_training" / "modelopt"
NAMES = ("finetune.sh", "generate.sh", "mmlu.sh", "convert.sh", "export.sh")
CONF = "Qwen/Qwen3-0.6B"
NUMBERS = ("TP", "PP", "CP", "EP", "ETP", "DP")
SPLIT = ("MLM_DATA_ARGS", "MLM_OPTIM_ARGS", "MLM_TRAIN_ARGS", "MLM_EVAL_ARGS", "MLM_RESUME_ARGS", "MLM_EXTRA_ARGS")
PLACES = ("HF_MODEL_CKPT", "TOKENIZER_MODEL", "MLM_MODEL_CKPT", "MLM_MODEL_SAVE", "MLM_WORK_DIR", "DATASET")
PROGRAMS = ("LAUNCH_SCRIPT", "PYTHON", "SANDBOX_ENV_SETUP", "MLM_ENV_SETUP")
"""They name what is run: the kinds in NAMED_PROGRAMS, an existing program, are no attack there."""
NAMED_PROGRAMS = ("traversal", "bare name")
PASSED = ("NCCL_IB_SL", "NCCL_IB_TIMEOUT", "CUDA_DEVICE_MAX_CONNECTIONS", "TOKENIZERS_PARALLELISM", "CDPATH", "SANDBOX_ROOT")
SEARCHED = ("PYTHONPATH",)
"""Not PYTHONWARNINGS: Python itself imports the module of a warning's class that it names."""
OWN = ("MODEL_ARGS", "PARALLEL_ARGS", "EXTRA_ARGS", "PROCESSES", "LAUNCH", "DATA", "PROMPTS", "SCRIPT_DIR", "MLM_MODEL_CFG")
"""Names that the scripts set: what the environment has under them must not count."""
VARIABLES = (*NUMBERS, *SPLIT, *PLACES, *PROGRAMS, *PASSED, *SEARCHED, *OWN, "OMP_NUM_THREADS", "$1")
ONLY: Mapping[str, tuple[str, ...]] = {"export.sh": ("EXPORT_DIR",), "generate.sh": ("PROMPTS_PATH", "DRAFT_LEN")}
"""Variables that one script alone reads."""
PLANTED = ("shlex", "random", "json", "re", "enum", "torch", "megatron_sft", "sitecustomize", "usercustomize")


def hostile_values(folder: Path) -> dict[str, str]:
    """{kind: value}; each would leave folder/marker."""
    run = f"touch {folder}/marker"
    return {
        "command": f"$({run})",
        "index": f"x[$({run})]",
        "backticks": f"a `{run}` b",
        "separators": f"1; {run}\n{run} & {run} | {run} && {run}",
        "quotes": f"'\"; {run}; '\"",
        "closed quote": f'"; {run}; "$({run})"',
        "brace": f"x}}; {run}; ${{x:-$({run})}}",
        "substitution": f"<({run}) >({run}) @Q ${{!x}}",
        "traversal": "../../../../../../../../.." + str(folder / "evil"),
        "option": f"-c {run}",
        "builtin": f"eval {run}",
        "glob": "* ? [a-z]* ~",
        "bare name": "evil",
        "here": ".",
        "nothing": "",
        "spaces": " \t ",
        "unicode": "\u2028\u00a0$\uff08touch\uff09\u202e",
        "bytes": "\udcff\udcfe$(touch marker)",
        "number": "08",
    }


def plant(folder: Path) -> None:
    """Modules, a program and confs that leave folder/marker when they are imported, run or sourced."""
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'marker')!r}, 'w')\n")
    for name in ("evil", "evil.sh", "dirname", "realpath", "nproc"):
        (folder / name).write_text(f"#!/bin/bash\ntouch {folder}/marker\n")
        (folder / name).chmod(0o755)


def trial(script: str, variable: str, kind: str) -> tuple[str, str]:
    """What was wrong, or nothing; and the status with what was printed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plant(folder)
        value = hostile_values(folder)[kind]
        launcher = folder / "print arguments"
        launcher.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
        launcher.chmod(0o755)
        kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        variables = {"HF_MODEL_CKPT": "/m", "MLM_MODEL_CKPT": "/c", "LAUNCH_SCRIPT": f"'{launcher}'", "PYTHON": sys.executable}
        arguments = [CONF]
        if variable == "$1":
            arguments = [value]
        else:
            variables[variable] = value
        environment = {os.fsencode(name): os.fsencode(text) for name, text in {**kept, **variables}.items()}
        command = [os.fsencode(word) for word in (str(SCRIPTS / script), *arguments)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, timeout=60, check=False)
        faults = []
        if (folder / "marker").exists():
            faults.append("something was run")
        if variable in PLACES + ONLY.get(script, ()) and done.returncode == 0 and value:
            words = done.stdout.split(b"\0")
            if variable != "MLM_WORK_DIR" and not _passes(script, variable, os.fsencode(value), words):
                faults.append("the value was changed on the way")
        if done.returncode not in (0, 2):
            faults.append(f"status {done.returncode}")
        said = (done.stdout[-200:] + done.stderr[-400:]).decode(errors="replace")
        return "; ".join(faults), f"{script} {variable}={value!a} ({kind}): status {done.returncode}: {said!a}"


def _passes(script: str, variable: str, value: bytes, words: list[bytes]) -> bool:
    """Whether the value is one word of the command line, where the script uses it (another variable may win)."""
    unused = {"HF_MODEL_CKPT", "MLM_MODEL_SAVE", "DATASET"} - (
        {"DATASET", "MLM_MODEL_SAVE"} if script == "finetune.sh" else set()
    )
    return variable in unused or value in words


def trials(everywhere: bool) -> Iterator[tuple[str, str, str]]:
    kinds = hostile_values(Path("/"))
    for variable, kind in itertools.product(VARIABLES, kinds):
        if variable in PROGRAMS and kind in NAMED_PROGRAMS:
            continue
        for script in NAMES if everywhere else NAMES[:1]:
            yield script, variable, kind
    for script, variables in ONLY.items():
        yield from ((script, variable, kind) for variable, kind in itertools.product(variables, kinds))


def main(words: list[str]) -> int:
    """Prints the figures; 1 when anything was run."""
    chosen = list(trials("all" in words))
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda one: trial(*one), chosen))
    faults = [(fault, said) for fault, said in outcomes if fault]
    for fault, said in faults:
        print(f"{fault}: {said}")
    refused = sum(": status 2:" in said for _, said in outcomes)
    print(f"{len(outcomes)} hostile values: {len(faults)} faults, {refused} refused, {len(outcomes) - refused} harmless")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
