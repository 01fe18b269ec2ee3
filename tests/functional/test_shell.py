"""The shell scripts: which command line each makes of its environment variables. Nothing is trained; the launcher prints."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.soak.hostile_shell import NUMBERS, VARIABLES, trial

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "post_training" / "modelopt"
CONF = "Qwen/Qwen3-0.6B"
OWN = ("MLM_", "HF_", "TP", "PP", "CP", "EP", "ETP", "DP", "DATASET", "LAUNCH_SCRIPT", "OMP_", "SANDBOX_", "TOKENIZER_", "PYTHON")


@pytest.fixture
def launcher(tmp_path: Path) -> str:
    """A LAUNCH_SCRIPT that prints its arguments and OMP_NUM_THREADS as JSON."""
    script = tmp_path / "print arguments.py"
    script.write_text("import json, os, sys\nprint(json.dumps([os.environ['OMP_NUM_THREADS'], *sys.argv[1:]]))\n")
    return f"'{sys.executable}' '{script}'"


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs one script with these variables and no others of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    environment |= {"PYTHON": sys.executable, **variables}
    return subprocess.run(
        [str(SCRIPTS / script), *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def arguments_of(script: str, *arguments: str, **variables: str) -> list[str]:
    """The command line that the script launches."""
    done = run(script, *arguments, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)[1:]


def test_memory_grows_in_segments_unless_it_is_said_otherwise() -> None:
    """torch's name, or its older one, which it reads where the other is not set."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    shown = f"'{sys.executable}' -c 'import os; print([os.environ.get(name) for name in {json.dumps(names)}])'"

    def found(**variables: str) -> str:
        given = {name: variables.get(name, "") for name in names}
        done = run("finetune.sh", CONF, LAUNCH_SCRIPT=shown, HF_MODEL_CKPT="/models/q", MLM_MODEL_SAVE="/out", **given)
        return done.stdout.strip()

    assert found() == "['expandable_segments:True', '']"
    assert found(PYTORCH_ALLOC_CONF="max_split_size_mb:64") == "['max_split_size_mb:64', '']"
    assert found(PYTORCH_CUDA_ALLOC_CONF="backend:native") == "['', 'backend:native']"


def value(arguments: list[str], flag: str) -> str:
    """What follows the last `flag`."""
    return arguments[len(arguments) - arguments[::-1].index(flag)]


def test_finetune_has_upstreams_defaults_and_reads_the_hf_folder(launcher: str) -> None:
    arguments = arguments_of("finetune.sh", CONF, LAUNCH_SCRIPT=launcher, HF_MODEL_CKPT="/models/q", MLM_MODEL_SAVE="/out")
    assert arguments[0] == str(SCRIPTS / "finetune.py")
    expected = {
        "--load": "/models/q",
        "--tokenizer-model": "/models/q",
        "--save": "/out",
        "--finetune-hf-dataset": "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered",
        "--train-samples": "128000",
        "--lr-decay-samples": "128000",
        "--lr-warmup-samples": "0",
        "--split": "100,0,0",
        "--lr": "5.0e-5",
        "--min-lr": "1.0e-7",
        "--lr-decay-style": "cosine",
        "--clip-grad": "1.0",
        "--weight-decay": "0.0",
        "--adam-beta1": "0.9",
        "--adam-beta2": "0.95",
        "--micro-batch-size": "1",
        "--eval-iters": "1",
        "--save-interval": "1000",
        "--log-interval": "100",
        "--tensor-model-parallel-size": "1",
        "--num-layers": "28",
    }
    assert {flag: value(arguments, flag) for flag in expected} == expected
    assert "--no-check-for-nan-in-loss-and-grad" not in arguments


@pytest.mark.parametrize("variables", [{}, {"MLM_MODEL_CKPT": "/runs/first"}, {"MLM_MODEL_CKPT": "/models/q"}])
def test_save_never_defaults_to_the_folder_that_is_read(launcher: str, variables: dict[str, str]) -> None:
    arguments = arguments_of(
        "finetune.sh", CONF, LAUNCH_SCRIPT=launcher, HF_MODEL_CKPT="/models/q", MLM_WORK_DIR="/work dir", **variables
    )
    assert value(arguments, "--load") == variables.get("MLM_MODEL_CKPT", "/models/q")
    assert value(arguments, "--save") == f"/work dir/{CONF}_sft"


def test_values_of_several_words_and_quotes_survive(launcher: str) -> None:
    arguments = arguments_of(
        "finetune.sh",
        CONF,
        LAUNCH_SCRIPT=launcher,
        DATASET="/my data/chats 1.jsonl",
        MLM_DATA_ARGS=" \\\n --train-samples 5 \\\n --finetune-hf-dataset '/other data/a b.jsonl' \\\n",
        MLM_OPTIM_ARGS="--lr 1e-5 -o --min-lr 0",
        MLM_EXTRA_ARGS="--chat-template \"{{ 'a b' }}\" --log-note '*' --last \"it's\"",
    )
    assert "128000" not in arguments
    assert value(arguments, "--finetune-hf-dataset") == "/other data/a b.jsonl"
    start = arguments.index("--lr")
    assert arguments[start : start + 5] == ["--lr", "1e-5", "-o", "--min-lr", "0"]
    assert arguments[-6:] == ["--chat-template", "{{ 'a b' }}", "--log-note", "*", "--last", "it's"]


def test_dataset_with_a_space_is_one_word(launcher: str) -> None:
    arguments = arguments_of("finetune.sh", CONF, LAUNCH_SCRIPT=launcher, DATASET="/my data/chats.jsonl")
    assert value(arguments, "--finetune-hf-dataset") == "/my data/chats.jsonl"


@pytest.mark.parametrize("kind", ["index", "separators"])
def test_no_hostile_value_of_any_variable_is_run(kind: str) -> None:
    """All kinds: tests/soak/hostile_shell.py."""
    faults = [said for variable in VARIABLES for fault, said in [trial("finetune.sh", variable, kind)] if fault]
    assert not faults, "\n".join(faults)


def test_words_of_a_variable_are_passed_on_as_they_are(launcher: str) -> None:
    text = "$(touch marker) `touch marker` ; touch marker"
    arguments = arguments_of("finetune.sh", CONF, LAUNCH_SCRIPT=launcher, MLM_EXTRA_ARGS=text)
    assert arguments[-len(text.split()) :] == text.split()


def test_sizes_are_whole_numbers_and_all_wrong_ones_are_named(launcher: str) -> None:
    done = run("finetune.sh", CONF, LAUNCH_SCRIPT=launcher, TP="two", DP="x[1]", CP="08", PP="-1", EP="1.5", ETP="100000")
    assert done.returncode == 2 and done.stdout == ""
    for name, wrong in {"TP": "two", "DP": "x[1]", "CP": "08", "PP": "-1", "EP": "1.5", "ETP": "100000"}.items():
        assert f"{name}='{wrong}'" in done.stderr
    assert "expected whole numbers from 1 to 99999" in done.stderr
    many = run("finetune.sh", CONF, LAUNCH_SCRIPT=launcher, **dict.fromkeys(NUMBERS, "99999"))
    assert many.returncode == 2 and "more than 999999 processes" in many.stderr


@pytest.mark.parametrize(
    "name", ["../evil", "Qwen/../../evil", "linked/evil", "-x", "Qwen/Qwen3-0.6B;true", ".hidden", "/", "evil"]
)
def test_a_conf_outside_its_folder_is_not_sourced(launcher: str, tmp_path: Path, name: str) -> None:
    confs = tmp_path / "conf" / "model"
    confs.mkdir(parents=True)
    (tmp_path / "conf" / "evil.sh").write_text(f"touch '{tmp_path}/marker'\nMODEL_ARGS=()\n")
    (confs / "linked").symlink_to("..")
    done = run("finetune.sh", name, LAUNCH_SCRIPT=launcher, SANDBOX_ROOT=str(tmp_path), HF_MODEL_CKPT="m")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "marker").exists()
    assert f"expected a conf below {confs}, such as Qwen/Qwen3-0.6B, or a file of your own as ./NAME.sh" in done.stderr


def test_a_conf_of_ones_own_is_named_by_its_path(launcher: str, tmp_path: Path) -> None:
    conf = tmp_path / "my conf.sh"
    conf.write_text("MODEL_ARGS=(--num-layers 3)\n")
    common = {"LAUNCH_SCRIPT": launcher, "HF_MODEL_CKPT": "m", "MLM_WORK_DIR": "/w"}
    arguments = arguments_of("finetune.sh", str(conf), **common)
    assert (value(arguments, "--num-layers"), value(arguments, "--save")) == ("3", "/w/my conf_sft")
    missing = run("finetune.sh", str(tmp_path / "none.sh"), **common)
    assert missing.returncode == 2 and "none.sh does not exist" in missing.stderr


def test_an_hf_folder_stands_for_a_conf(launcher: str, tmp_path: Path) -> None:
    """Its config.json says the flags; a folder here without ./ is no conf, and the message says what to write."""
    source = SCRIPTS.parents[2] / "tests" / "assets" / "hf_configs" / "Qwen__Qwen3-0.6B.json"
    folder = tmp_path / "my model"
    folder.mkdir()
    shutil.copy(source, folder / "config.json")
    arguments = arguments_of("finetune.sh", str(folder), LAUNCH_SCRIPT=launcher, MLM_WORK_DIR="/w")
    by_name = arguments_of("finetune.sh", CONF, LAUNCH_SCRIPT=launcher)
    same = ("--num-layers", "--hidden-size", "--rotary-base", "--seq-length", "--padded-vocab-size")
    assert [value(arguments, flag) for flag in same] == [value(by_name, flag) for flag in same]
    assert (value(arguments, "--load"), value(arguments, "--save")) == (str(folder), "/w/my model_sft")
    without = run("finetune.sh", str(tmp_path), LAUNCH_SCRIPT=launcher)
    assert without.returncode == 2 and "has no config.json; expected a conf below" in without.stderr
    (tmp_path / "plain").symlink_to(folder)
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "LAUNCH_SCRIPT": launcher}
    words = [SCRIPTS / "finetune.sh", "plain"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Write ./plain for it" in done.stderr


def test_unbalanced_quote_is_an_error(launcher: str) -> None:
    done = run("finetune.sh", CONF, LAUNCH_SCRIPT=launcher, MLM_EXTRA_ARGS="--lr '1e-5")
    assert done.returncode == 2
    assert "cannot be split into words. Check its quotes." in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [
        ({"DP": "4"}, 4),
        ({"TP": "2"}, 2),
        ({"TP": "2", "PP": "2", "CP": "2", "DP": "2"}, 16),
        ({"TP": "1", "EP": "4", "DP": "1"}, 4),
    ],
)
def test_processes_follow_the_parallel_sizes(tmp_path: Path, sizes: dict[str, str], processes: int) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == -I ]] && exec "{sys.executable}" "$@"\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    done = run("finetune.sh", CONF, **{**sizes, "PYTHON": str(python)})
    words = done.stdout.split("\n")
    assert words[:4] == ["-m", "megatron_sft.launch", "--standalone", f"--nproc_per_node={processes}"]
    assert value(words, "--tensor-model-parallel-size") == sizes.get("TP", "1")


def test_one_process_needs_no_torchrun(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == -I ]] && exec "{sys.executable}" "$@"\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    done = run("finetune.sh", CONF, PYTHON=str(python))
    assert done.stdout.split("\n")[0] == str(SCRIPTS / "finetune.py")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_python_without_our_packages_is_one_line(tmp_path: Path, processes: str) -> None:
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    python = tmp_path / "bare/bin/python"
    done = run("finetune.sh", CONF, PYTHON=str(python), DP=processes)
    assert done.returncode == 2
    assert f"{python}: this Python has no package" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_python_that_does_not_run_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\nexit 1\n")
    python.chmod(0o755)
    done = run("finetune.sh", CONF, PYTHON=str(python))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"PYTHON={python} does not run as Python 3.11 or later" in done.stderr


def test_unknown_model_and_missing_model_are_errors(launcher: str) -> None:
    missing, unknown = run("finetune.sh", LAUNCH_SCRIPT=launcher), run("finetune.sh", "Qwen/Nothing", LAUNCH_SCRIPT=launcher)
    assert (missing.returncode, unknown.returncode) == (2, 2)
    assert "no model named; expected one of:" in missing.stderr and CONF in missing.stderr
    assert "conf/Qwen/Nothing.sh does not exist" in unknown.stderr


def test_other_scripts(launcher: str) -> None:
    common = {"LAUNCH_SCRIPT": launcher, "HF_MODEL_CKPT": "/models/q", "MLM_WORK_DIR": "/w"}
    generate = arguments_of("generate.sh", CONF, PROMPTS_PATH="/a b/prompts.jsonl", MLM_MODEL_CKPT="/sft", **common)
    assert generate[0] == str(SCRIPTS / "generate.py")
    assert (value(generate, "--prompts-path"), value(generate, "--load")) == ("/a b/prompts.jsonl", "/sft")
    assert value(generate, "--tokenizer-model") == "/models/q"
    mmlu = arguments_of("mmlu.sh", CONF, MLM_EXTRA_ARGS="--fraction 0.05", **common)
    assert mmlu[:3] == ["-m", "megatron_sft", "mmlu"] and mmlu[-2:] == ["--fraction", "0.05"]
    scores = arguments_of("eval.sh", CONF, MLM_EXTRA_ARGS="--eval-tasks chatcore", **common)
    assert scores[:3] == ["-m", "megatron_sft", "eval"] and scores[-2:] == ["--eval-tasks", "chatcore"]
    convert = arguments_of("convert.sh", CONF, **common)
    assert (value(convert, "--load"), value(convert, "--save")) == ("/models/q", f"/w/{CONF}_mlm")
    export = arguments_of("export.sh", CONF, MLM_MODEL_CKPT="/sft", EXPORT_DIR="/hf out", **common)
    assert (value(export, "--load"), value(export, "--save-hf")) == ("/sft", "/hf out")
    assert "MLM_MODEL_CKPT is not set" in run("export.sh", CONF, **common).stderr


def test_sandbox_files_are_sourced_first(launcher: str, tmp_path: Path) -> None:
    setup = tmp_path / "environment.sh"
    setup.write_text("export HF_MODEL_CKPT=/from/setup TP=2\n")
    arguments = arguments_of("finetune.sh", CONF, LAUNCH_SCRIPT=launcher, SANDBOX_ENV_SETUP=str(setup))
    assert (value(arguments, "--load"), value(arguments, "--tensor-model-parallel-size")) == ("/from/setup", "2")


def test_a_setup_file_is_not_looked_up_in_the_search_path(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "setup").write_text(f"touch '{tmp_path}/marker'\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("finetune.sh", CONF, LAUNCH_SCRIPT=launcher, MLM_ENV_SETUP="setup", PATH=path)
    assert done.returncode == 2 and "./setup cannot be read; expected a file that sets variables." in done.stderr
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("command", "variable"),
    [
        (["bench/gpu.sh", "--cpu", "{tmp}"], "BENCH_S"),
        (["bench/gpu.sh", "--cpu", "{tmp}"], "TESTS_S"),
        (["examples/slurm/finetune.sbatch"], "SLURM_JOB_ID"),
        (["examples/slurm/finetune.sbatch"], "MASTER_PORT"),
        (["examples/slurm/finetune.sbatch"], "SLURM_GPUS_ON_NODE"),
    ],
)
def test_other_scripts_count_with_numbers_only(tmp_path: Path, command: list[str], variable: str) -> None:
    root = SCRIPTS.parents[2]
    slurm = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    environment = {**os.environ, "BENCH_PYTHON": "true", **slurm, variable: f"x[$(touch {tmp_path}/marker)]"}
    words = [word.format(tmp=tmp_path) for word in command]
    done = subprocess.run(["bash", *words], cwd=root, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "whole number" in done.stderr
    assert not (tmp_path / "marker").exists()
