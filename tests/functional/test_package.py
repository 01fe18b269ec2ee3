"""The wheel: built, installed without the network into an empty environment, and used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from megatron_sft import shell
from megatron_sft.__main__ import by_script
from megatron_sft.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
OWN = ("MLM_", "HF_", "TP", "PP", "CP", "EP", "ETP", "DP", "DATASET", "LAUNCH_SCRIPT", "SANDBOX_", "TOKENIZER_", "PYTHON")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("megatron_sft", "conf", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "finetune.py", "generate.py"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
        str(source),
    ]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed `megatron-sft`, in an environment that has the other packages of this one and not this checkout."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "megatron-sft"


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def test_the_wheel_has_scripts_and_confs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    scripts = {f"megatron_sft/scripts/{name}" for name in ("finetune.py", "generate.py", *(f"{name}.sh" for name in shell.NAMES))}
    confs = {f"megatron_sft/scripts/conf/{path.relative_to(ROOT / 'conf')}" for path in ROOT.joinpath("conf").rglob("*.sh")}
    assert scripts | confs <= names and len(confs) > 60
    assert not [name for name in names if name.startswith(("conf/", "examples/", "tests/"))]


def test_one_step_from_an_empty_folder(command: Path, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """An HF folder in place of a conf; a variable, and flags behind it."""
    flags = ["--train-iters", "1", "--seq-length", "256", "--data-cache-path", tmp_path / "cache", "--num-workers", "1"]
    variables = environment(MLM_MODEL_SAVE=str(tmp_path / "out"), DATASET=str(rows_file))
    here = tmp_path / "empty"
    here.mkdir()
    done = subprocess.run(
        [command, "finetune", tiny_folder, *map(str, flags)], cwd=here, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(tmp_path.joinpath("out", "metrics.jsonl").read_text())["iteration"] == 1
    assert tmp_path.joinpath("out", "iter_0000001").is_dir() and not list(here.iterdir())


def test_a_conf_of_the_package_and_one_of_ones_own(command: Path, tmp_path: Path) -> None:
    """The launcher prints; the confs are the wheel's, the interpreter is the environment's."""
    launcher = tmp_path / "show.py"
    launcher.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    own = tmp_path / "own.sh"
    own.write_text("HF_MODEL_CKPT=/models/own\nMODEL_ARGS=(--num-layers 3)\n")
    variables = environment(LAUNCH_SCRIPT=f"{sys.executable} {launcher}", MLM_EXTRA_ARGS="--lr 1e-5")
    for conf, layers in (("Qwen/Qwen3-0.6B", "28"), ("./own.sh", "3")):
        done = subprocess.run(
            [command, "finetune", conf, "--lr", "2e-5"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
        )
        words = json.loads(done.stdout)
        (script,) = command.parents[1].glob("lib/python*/site-packages/megatron_sft/scripts/finetune.py")
        assert words[0] == str(script.resolve())
        assert words[words.index("--num-layers") + 1] == layers
        assert words[-4:] == ["--lr", "1e-5", "--lr", "2e-5"]


def test_flags_behind_a_conf_reach_every_script(tmp_path: Path) -> None:
    """Before, `./finetune.sh Qwen/Qwen3-0.6B --lr 1e-5` left them out without a word."""
    launcher = tmp_path / "show.py"
    launcher.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    variables = environment(
        LAUNCH_SCRIPT=f"{sys.executable} {launcher}", MLM_MODEL_CKPT="/sft", PYTHON=sys.executable, MLM_EXTRA_ARGS="--a b"
    )
    for name in shell.NAMES:
        script = shell.scripts() / f"{name}.sh"
        done = subprocess.run(
            [script, "Qwen/Qwen3-0.6B", "--x", "y z"], env=variables, capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout)[-4:] == ["--a", "b", "--x", "y z"], name


def test_a_conf_below_a_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"finetune Qwen/Qwen3-0\.6B starts its processes itself"):
        by_script("finetune", ["Qwen/Qwen3-0.6B"], 2)


def test_scripts_show_the_help_of_their_command() -> None:
    """Before, --help was taken for the name of a model."""
    for name in shell.NAMES:
        done = subprocess.run(
            [shell.scripts() / f"{name}.sh", "--help"],
            env=environment(PYTHON=sys.executable),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith(f"usage: megatron-sft {name} [CONF] [flags]") and "\nexamples\n" in done.stdout
