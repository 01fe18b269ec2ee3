"""Whole training steps on the device: the CPU's numbers, and a resumed run that is the uninterrupted one bit by bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sft.checkpoint.distributed import CheckpointSaver, load_checkpoint
from megatron_sft.config.run import CheckpointConfig
from megatron_sft.core_compat import use_deterministic_algorithms
from tests.gpu.place import CUDA, error, on_cuda, on_device, without_gpu
from tests.gpu.training import STEPS, Training, trained
from tests.text_models import text_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory, ranks):
    """The same training on the CPU, in a process that sees no GPU; without CUDA in this one."""
    if not CUDA:
        return {dtype: trained(dtype, ranks) for dtype in ("fp32", "bf16")}
    out = tmp_path_factory.mktemp("cpu") / "trained.pt"
    return without_gpu("tests.gpu.training", ["fp32,bf16", str(out)], out, timeout=120)


@on_device
def test_training_in_fp32_is_the_cpus(on_the_cpu, ranks):
    ours, theirs = trained("fp32", ranks), on_the_cpu["fp32"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert error(ours["gradient"], theirs["gradient"]) <= 1e-4


@on_device
def test_training_in_bf16_errs_no_more_than_twice_as_much_as_the_cpu(on_the_cpu, ranks):
    ours, theirs, exact = trained("bf16", ranks), on_the_cpu["bf16"], on_the_cpu["fp32"]
    assert error(ours["gradient"], exact["gradient"]) <= 2 * error(theirs["gradient"], exact["gradient"])
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)  # eight bits of mantissa: 2^-9 = 2e-3


@pytest.fixture
def deterministic():
    use_deterministic_algorithms()
    yield
    torch.use_deterministic_algorithms(False)


@on_device
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(dtype, asynchronous, tmp_path, ranks, deterministic):
    config = CheckpointConfig(save=str(tmp_path), async_save=asynchronous)
    whole = Training.fresh(dtype, ranks, config)
    losses = whole.train(1, 2)
    saver = CheckpointSaver(tmp_path, whole.run, ranks)
    saver.save(2, whole.chunks, whole.optimizer, whole.scheduler, {"consumed_train_samples": 8})
    losses += whole.train(3, STEPS)
    saver.finish()

    resumed = Training.fresh(dtype, ranks, config)
    with torch.no_grad():
        for parameter in resumed.chunks[0].parameters():
            parameter.fill_(torch.nan)
    load_checkpoint(tmp_path, resumed.chunks, resumed.optimizer, resumed.scheduler, ranks)
    assert resumed.train(3, STEPS) == losses[2:]
    assert resumed.digest() == whole.digest()


@on_cuda
def test_finetune_resumes_bit_by_bit(tmp_path):
    """The program itself in bf16: six iterations at once; three, a save in the background, a restart and three more."""
    text_model("qwen3", tmp_path / "hf")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for n in range(40):
            messages = [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes. " * (n % 9 + 1)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    flags = f"--load {tmp_path}/hf --tokenizer-model {tmp_path}/hf --finetune-hf-dataset {tmp_path}/rows.jsonl"
    flags += f" --data-cache-path {tmp_path}/cache --num-workers 1 --train-iters 6 --lr 1e-3 --global-batch-size 2"
    flags += " --bf16 --seq-length 256 --deterministic-mode --async-save --save-interval 3 --save-hf"

    def run(name: str, *more: str, status: int = 0) -> list[float]:
        save = tmp_path / name
        command = [sys.executable, "finetune.py", *flags.split(), f"{save}-hf", "--save", str(save), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return [json.loads(line)["sft/loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]

    losses = run("whole")
    run("parts", "--exit-interval", "3", status=4)
    assert run("parts") == losses
    files = [tmp_path / f"{name}-hf" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
