"""examples/slurm/finetune.sbatch as two machines on this one: two torchrun agents give the losses of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.conftest import metrics_of
from tests.gloo import ROOT

SCONTROL = '#!/bin/bash\n[[ "$*" == "show hostnames node[1-2]" ]] && printf "localhost\\nnode2\\n"\n'
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 9
shift
for node in 0 1; do SLURM_NODEID=${node} "$@" > "${COLLECTED}.${node}" 2>&1 & done
wait -n && wait -n
"""
"""What Slurm's commands do, as far as the script needs them: one task a machine, each with its number."""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines with one process each."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLM_", "HF_", "SLURM_"))}
    return kept | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "COLLECTED": str(tmp_path / "output"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "4711",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "MASTER_PORT": str(port),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }


def start(environment: dict[str, str], **changed: str) -> subprocess.CompletedProcess[str]:
    """bash, as Slurm runs the script."""
    command = ["bash", str(ROOT / "examples" / "slurm" / "finetune.sbatch"), "tiny"]
    return subprocess.run(
        command, env={**environment, **changed}, capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )


def test_two_machines_give_the_losses_of_one_process(slurm, finetune, tiny_folder, rows_file, tmp_path):
    conf = tmp_path / "confs" / "conf" / "model" / "tiny.sh"
    conf.parent.mkdir(parents=True)
    conf.write_text("MODEL_ARGS=(--seq-length 256)\n")
    flags = ["--lr", "1e-3", "--train-iters", "3", "--global-batch-size", "4", "--num-workers", "1", "--min-lr", "0"]
    flags += ["--data-cache-path", str(tmp_path / "cache"), "--save-interval", "100"]
    done = start(
        slurm,
        SANDBOX_ROOT=str(tmp_path / "confs"),
        DP="2",
        HF_MODEL_CKPT=str(tiny_folder),
        DATASET=str(rows_file),
        MLM_MODEL_SAVE=str(tmp_path / "two"),
        MLM_OPTIM_ARGS=" ",
        MLM_EVAL_ARGS="--log-interval 1",
        MLM_EXTRA_ARGS=" ".join(flags),
    )
    outputs = [Path(f"{slurm['COLLECTED']}.{node}").read_text() for node in (0, 1)]
    assert done.returncode == 0, (done.stdout + done.stderr, *outputs)
    assert finetune(*flags, "--save", tmp_path / "one").returncode == 0
    one, two = ([line["sft/loss"] for line in metrics_of(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-6)
    assert "iteration        3/" in outputs[0] and "iteration        3/" not in outputs[1]


def test_a_job_outside_the_checkout_says_so(slurm, tmp_path):
    done = start(slurm, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "finetune.sh does not exist; expected the checkout. Call sbatch in it, or set MEGATRON_SFT to its path." in done.stderr
