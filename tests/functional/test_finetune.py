"""finetune.py from the command line: what it writes, resume, several processes, and what goes wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.functional.conftest import metrics_of
from tests.gloo import ROOT
from tests.unit.train.test_metrics import tensorboard_points

KEYS = {"iteration", "sft/loss", "sft/trained_tokens", "sft/tokens_seen", "sft/epoch", "grad_norm", "lr", "perf/tokens_per_s"}


def test_a_run_writes_checkpoint_metrics_and_hf_folder(finetune, tiny_folder, tmp_path):
    save, exported = tmp_path / "out", tmp_path / "hf"
    flags = ["--save", save, "--save-hf", exported, "--num-epoch", "2", "--global-batch-size", "4", "--lr", "1e-3"]
    done = finetune(*flags, "--split", "90,10,0", "--eval-iters", "-1", "--eval-interval", "2", "--save-interval", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = metrics_of(save)
    assert all(KEYS <= line.keys() for line in lines)
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    packs = lines[len(lines) // 2 - 1]["consumed_samples"]
    assert lines[-1]["consumed_samples"] == 2 * packs and lines[-1]["sft/epoch"] == 2.0
    assert packs % 4, "the data must end with a partial batch for this test to mean anything"
    assert "valid/loss" in lines[1] and lines[-1]["sft/loss"] < lines[0]["sft/loss"]
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == str(len(lines))
    assert (save / f"iter_{len(lines):07d}" / ".metadata").exists() and list((save / "tensorboard").iterdir())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(exported)
    assert AutoTokenizer.from_pretrained(exported).chat_template
    before = load_file(tiny_folder / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in trained.state_dict().items() if name in before)


def test_stop_and_resume_is_bit_identical_around_an_epochs_end(finetune, tmp_path):
    """6 steps an epoch of 3: stopping after 2, 3 and 4 gives the unbroken run's losses and weights."""
    flags = ["--lr", "1e-3", "--global-batch-size", "4", "--train-iters", "7", "--lr-warmup-iters", "2"]
    whole = tmp_path / "whole"
    assert finetune(*flags, "--save", whole, "--save-hf", tmp_path / "hf", "--save-interval", "1").returncode == 0
    expected, weights = metrics_of(whole), load_file(tmp_path / "hf" / "model.safetensors")
    assert len({int(line["sft/epoch"]) for line in expected}) > 1
    for stop in (1, 3, 4):
        again = tmp_path / f"again{stop}"
        shutil.copytree(whole / f"iter_{stop:07d}", again / f"iter_{stop:07d}")
        (again / "latest_checkpointed_iteration.txt").write_text(str(stop))
        done = finetune(*flags, "--save", again, "--save-hf", tmp_path / f"hf{stop}")
        assert done.returncode == 0, done.stdout + done.stderr
        resumed = {line["iteration"]: (line["sft/loss"], line["grad_norm"], line["lr"]) for line in metrics_of(again)}
        assert resumed == {
            line["iteration"]: (line["sft/loss"], line["grad_norm"], line["lr"]) for line in expected if line["iteration"] > stop
        }
        again_weights = load_file(tmp_path / f"hf{stop}" / "model.safetensors")
        assert all(torch.equal(weights[name], again_weights[name]) for name in weights)


STEPS = 20


def test_20_steps_equal_a_plain_transformers_loop(finetune, tiny_folder, tmp_path):
    """The same packs in the same order through transformers and torch's AdamW: every loss within 1e-4."""
    flags = ["--lr", "1e-3", "--lr-decay-style", "cosine", "--train-iters", str(STEPS), "--global-batch-size", "2"]
    done = finetune(*flags, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    ours = [line["sft/loss"] for line in metrics_of(tmp_path / "out")]
    theirs = plain_losses(tiny_folder, tmp_path / "cache")
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.5


def plain_losses(folder: Path, cache: Path) -> list[float]:
    """A loop with nothing of ours but the packs: one document at a time, token sums, one division, AdamW, cosine."""
    from transformers import AutoModelForCausalLM

    from megatron_sft.config.run import TrainConfig
    from megatron_sft.data.loader import TrainLoader
    from megatron_sft.data.packing import pack
    from megatron_sft.data.sft_dataset import SFTDataset
    from megatron_sft.data.store import TokenStore

    store = TokenStore(next(path.parent for path in cache.rglob("store.json")))
    dataset = SFTDataset(store, pack(store.lengths, 256, "best-fit"), 256, 0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for number, step in enumerate(TrainLoader(dataset, TrainConfig(train_iters=STEPS, global_batch_size=2), prefetch=0)):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (np.cos(np.pi * number / STEPS) + 1)
        documents = [store.document(i) for batch in step.micro_batches for i in batch.document_ids if i >= 0]
        trained = sum(int(mask[1:].sum()) for _, mask in documents)
        total = 0.0
        for tokens, mask in documents:
            ids = torch.tensor(np.array(tokens), dtype=torch.int64)[None]
            labels = torch.where(torch.tensor(np.array(mask)).bool(), ids, -100)
            logits = model(ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum") / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    "layout", [["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], ["--use-distributed-optimizer"]]
)
def test_two_processes_give_the_losses_of_one(finetune, tmp_path, layout):
    flags = ["--lr", "1e-3", "--train-iters", "5", "--global-batch-size", "4"]
    assert finetune(*flags, "--save", tmp_path / "one").returncode == 0
    done = finetune(*flags, "--save", tmp_path / "two", *layout, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = ([line["sft/loss"] for line in metrics_of(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6)


def test_padding_of_the_vocabulary_is_cut_off_on_export(finetune, tiny_folder, tmp_path):
    """--make-vocab-size-divisible-by pads 260 rows to 300; the HF folder has 260 again, and generates."""
    out = tmp_path / "hf"
    done = finetune("--train-iters", "1", "--lr", "1e-3", "--make-vocab-size-divisible-by", "100", "--save-hf", out)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, out))
    assert {name: tensor.shape for name, tensor in after.items()} == {name: tensor.shape for name, tensor in before.items()}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 260
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_bf16_recompute_and_schedules_run(finetune, tmp_path):
    flags = ["--bf16", "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    flags += ["--train-samples", "6", "--lr-decay-style", "WSD", "--lr-wsd-decay-samples", "2", "--micro-batch-size", "2"]
    done = finetune(*flags, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics_of(tmp_path / "out")[-1]["consumed_samples"] == 6


def test_exit_interval_saves_and_says_so(finetune, tmp_path):
    done = finetune("--train-iters", "5", "--exit-interval", "2", "--save", tmp_path / "out")
    assert done.returncode == 4, done.stdout + done.stderr
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_sigterm_saves_and_says_so(finetune, tiny_folder, rows_file, tmp_path):
    command = [sys.executable, "finetune.py", "--load", tiny_folder, "--finetune-hf-dataset", rows_file, "--seq-length", "256"]
    command += ["--train-iters", "100000", "--save", tmp_path / "out", "--data-cache-path", tmp_path / "cache"]
    command += ["--num-workers", "1"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    for line in process.stdout:
        if "iteration        3/" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    saved = int((tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == metrics_of(tmp_path / "out")[-1]["iteration"] >= 3


def test_nan_stops_before_the_update_and_names_iteration_and_row(finetune, tiny_folder, rows_file, tmp_path):
    """A NaN planted in the embedding of "@", which one row alone has."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    broken, rows = tmp_path / "broken", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(broken)("@")["input_ids"][0]] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    lines = rows_file.read_text().splitlines()
    lines[11] = lines[11].replace("What is", "@ What is")
    rows.write_text("\n".join(lines) + "\n")
    flags = ["--load", broken, "--finetune-hf-dataset", rows, "--no-verify-conversion", "--global-batch-size", "2"]
    done = finetune(*flags, "--num-epoch", "1", "--no-shuffle", "--save", tmp_path / "out")
    assert done.returncode == 3, done.stdout + done.stderr
    finished = metrics_of(tmp_path / "out")
    expected = f"iteration {len(finished) + 1}: loss or gradient is not finite in the rows {rows}:12."
    assert expected in done.stdout and "Traceback" not in done.stdout
    losses = [(line["iteration"], float(np.float32(line["sft/loss"]))) for line in finished]
    assert tensorboard_points(tmp_path / "out" / "tensorboard")["sft/loss"] == losses and losses


def test_held_out_files_have_losses_of_their_own(finetune, rows_file, tmp_path):
    """More held-out sources than training has; the total is the mean over their trained tokens."""
    for name, lines in (("easy", slice(0, 9)), ("hard", slice(9, 23))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows_file.read_text().splitlines()[lines]) + "\n")
    valid = ["--valid-data", tmp_path / "easy.jsonl", tmp_path / "hard.jsonl", "--eval-iters", "-1"]
    done = finetune(*valid, "--train-iters", "1", "--save", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    last = metrics_of(tmp_path / "out")[-1]
    parts = sorted([last["valid/loss/easy"], last["valid/loss/hard"]])
    assert parts[0] < last["valid/loss"] < parts[1]


def test_a_finished_run_is_not_trained_again(finetune, tmp_path):
    flags = ["--train-iters", "1", "--save", tmp_path / "out"]
    assert finetune(*flags).returncode == 0
    again = finetune(*flags)
    assert again.returncode == 3 and "trained to iteration 1 already" in again.stdout


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(finetune, tiny_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["Really"])
    tokenizer.save_pretrained(tmp_path / "larger")
    done = finetune("--tokenizer-model", tmp_path / "larger", "--train-iters", "1", "--save", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    message = f"the rows have token id {len(tokenizer) - 1}, but the model's vocabulary ends at {len(tokenizer) - 2}."
    assert message in done.stdout + done.stderr


def test_changed_data_is_refused_on_resume(finetune, tmp_path):
    assert finetune("--train-iters", "1", "--save", tmp_path / "out").returncode == 0
    other = finetune("--train-iters", "2", "--save", tmp_path / "out", "--seed", "7")
    assert other.returncode == 2 and "data.seed: 1234 -> 7" in other.stdout


BAD = {
    "missing file": (["--finetune-hf-dataset", "{tmp}/none.jsonl"], "none.jsonl"),
    "empty file": (["--finetune-hf-dataset", "{tmp}/empty.jsonl"], "empty.jsonl"),
    "no checkpoint": (["--load", "{tmp}"], "neither an HF folder"),
    "tp does not divide": (["--tensor-model-parallel-size", "3"], "3"),
    "short sequences": (["--seq-length", "8"], "Check --seq-length"),
    "long rows refused": (["--seq-length", "64", "--truncation", "error"], "Raise --seq-length"),
    "save is a file": (["--save", "{tmp}/empty.jsonl"], "cannot be written"),
    "flag against config.json": (["--norm-epsilon", "0.5", "--num-layers", "9"], "norm_epsilon = 0.5"),
    "no template": (["--tokenizer-model", "{tmp}/bare"], "no chat template"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_clear_error_and_leaves_nothing(name, finetune, tiny_folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    shutil.copytree(tiny_folder, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(config))
    flags, expected = BAD[name]
    save = [] if "--save" in flags else ["--save", str(tmp_path / "out")]
    done = finetune("--train-iters", "1", *save, *(flag.format(tmp=tmp_path) for flag in flags))
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_every_rank_ends_by_itself_within_10_seconds_when_a_row_is_bad(tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "robot", "content": "a"}]}\n' * 30)
    flags = ["--load", tiny_folder, "--tokenizer-model", tiny_folder, "--finetune-hf-dataset", tmp_path / "rows.jsonl"]
    command = [sys.executable, "finetune.py", *flags, "--train-iters", "1", "--data-cache-path", tmp_path / "cache"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    try:
        said = [rank.communicate(timeout=10)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode not in (0, None) for rank in ranks)
    assert any("rows.jsonl:1: message 1 has role 'robot'" in text for text in said), said
