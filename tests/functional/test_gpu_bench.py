"""bench/gpu.sh's CPU form: the tests of tests/gpu, the table of a tiny shape, first contact, and the JSON files of each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import gpu, gpu_first, gpu_parts
from bench.gpu_cells import SHAPES, Sizes, model_flags, run_config, squares_of

ROOT = Path(__file__).parents[2]
FLOORS = {"Qwen3-0.6B": 143e3, "Qwen3-1.7B": 62e3, "Qwen3-4B": 26.7e3, "Qwen3-8B": 15.3e3}
"""Tokens/s of docs/gpu.md, for documents whose mean of length^2 over mean length is 1,895."""


def test_cpu_form_writes_every_field(tmp_path: Path) -> None:
    environment = {**os.environ, "BENCH_PYTHON": sys.executable, "BENCH_S": "600", "OMP_NUM_THREADS": "1"}
    environment["BENCH_ARGS"] = "--budget-seconds 5 --engines ours"
    command = ["bash", "bench/gpu.sh", "--cpu", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["tests"]["status"] == 0 and report["tests"]["failed"] == report["tests"]["error"] == 0
    assert report["tests"]["passed"] > 30 and report["tests"]["skipped"] == 1 and not report["tests"]["unfinished"]
    assert {"date", "command", "versions", "device", "budget_seconds", "rows"} <= report.keys()
    assert report["versions"]["torch"] and report["versions"]["megatron-core"]
    assert report["device"]["type"] == "cpu" and report["device"]["matmul_tflops"] > 0
    (ours,) = report["rows"]
    assert (ours["shape"], ours["engine"], ours["status"]) == ("tiny", "ours", "ok") and ours["steps"] >= 1
    assert ours["tokens_per_s"] > 0 and ours["peak_gib"] > 0
    share = ours["tflops"] / report["device"]["matmul_tflops"]  # above 1 where other work slowed the product's milliseconds
    assert ours["mfu"] == pytest.approx(share) and share > 0
    assert ours["bytes_per_parameter"] == 18 and ours["tried"] == [[4, False, "ok"]]
    assert ours["first_loss"] == pytest.approx(np.log(256), abs=0.1)  # random weights guess among 256 ids
    assert len(ours["kernels"]) == 15 and {"name", "ms", "calls"} == ours["kernels"][0].keys()
    assert ours["busy_share"] > 0 and ours["launches"] == 0
    assert "tok/s" in done.stdout and "no floor for this device" in done.stdout


def test_first_contact_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    """A part that is there stays; one that was begun twice and never ended has failed; the others are done."""
    folder = tmp_path / "first"
    folder.mkdir()
    gpu_parts.write(folder / "smoke.json", {"part": "smoke", "status": "ok", "attempts": 1, "figures": "mine"})
    gpu_parts.write(folder / "adam.json", {"part": "adam", "status": "begun", "attempts": 2})
    gpu_parts.write(folder / "rope.json", {"part": "rope", "status": "begun", "attempts": 1})
    environment = {**os.environ, "BENCH_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", "bench/gpu.sh", "first", "--cpu", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    rows = {row["part"]: row for row in json.loads((folder / "first.json").read_text())["parts"]}
    assert done.returncode == 1 and list(rows) == gpu_parts.wanted(cpu=True), done.stdout + done.stderr
    assert rows["smoke"]["figures"] == "mine" and rows["rope"]["attempts"] == 2
    failed = {name: row["status"] for name, row in rows.items() if row["status"] != "ok"}
    assert failed == {"adam": "failed: begun twice, never ended"}, (folder / "first.log").read_text()
    figures = {name: row["figures"] for name, row in rows.items() if row["status"] == "ok" and name != "smoke"}
    assert figures["loss"]["aligned"]["block_rows"] == 600 and figures["attention"]["sinks"]["both_ms"] > 0
    assert not [name for name, found in figures.items() if "error" in json.dumps(found)]


PYTHON = """#!/bin/bash
if [[ $* == *' rope '* ]]; then
  echo '{"attempts": 1}' >rope.json
  echo 'no such kernel' >&2
  exit 9
fi
echo '{"part": "norms", "status": "ok", "attempts": 1}' >norms.json
"""


def test_a_part_that_ends_its_process_leaves_the_next_ones_running(tmp_path: Path, monkeypatch, capsys) -> None:
    """rope's process ends within it, norms is done in another one, and nothing is left."""
    python = tmp_path / "python"
    python.write_text(PYTHON.replace(" >rope", f" >{tmp_path}/rope").replace(" >norms", f" >{tmp_path}/norms"))
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["gpu_first.py", "--out", str(tmp_path), "--parts", "rope,norms"])
    assert gpu_first.main() == 1
    assert "rope: failed: status 9: no such kernel" in capsys.readouterr().out
    rows = json.loads((tmp_path / "first.json").read_text())
    assert [row["status"][:6] for row in rows["parts"]] == ["failed", "ok"] and rows["left"] == []
    monkeypatch.setattr(sys, "argv", ["gpu_first.py", "--out", str(tmp_path), "--parts", "smoke", "--budget-seconds", "1"])
    assert gpu_first.main() == 3


def test_tests_that_were_cut_off_are_counted() -> None:
    """A log that ends within a test, as under a time limit."""
    head = (
        "collected 4 items\n\ntests/gpu/test_a.py::test_x[a b] PASSED [ 25%]\ntests/gpu/test_a.py::test_y SKIPPED (no) [ 50%]\n"
    )
    log = head + "tests/gpu/test_a.py::test_z FAILED [ 75%]\ntests/gpu/test_b.py::test_w "
    counts = {"passed": 1, "failed": 1, "error": 0, "skipped": 1, "not_passed": ["tests/gpu/test_a.py::test_z"]}
    assert gpu.counted(log) == {**counts, "unfinished": "tests/gpu/test_b.py::test_w"}
    assert gpu.counted(head) == {**counts, "failed": 0, "not_passed": [], "unfinished": ""}


def test_arguments_that_are_none_are_refused(tmp_path: Path) -> None:
    for arguments in ([], ["--gpu"], [str(tmp_path), "more"], ["first"], ["--cpu", "first", str(tmp_path)]):
        done = subprocess.run(["bash", "bench/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "usage: " in done.stderr


@pytest.mark.parametrize("shape", FLOORS)
def test_floor_is_that_of_the_derivation(shape: str) -> None:
    assert gpu.floor_tokens_per_s(run_config(shape, 1, False).model, 1895) == pytest.approx(FLOORS[shape], rel=0.01)


def test_shapes_are_those_of_the_confs() -> None:
    assert [name for name in SHAPES if SHAPES[name].share] == list(FLOORS)
    assert Sizes.of("Qwen3-1.7B-64k").packs * Sizes.of("Qwen3-1.7B-64k").seq_length == 2**16
    cut = ("Qwen3-30B-A3B-6", "gpt-oss-20b-6", "gemma-2-2b", "Nemotron-H-4B-13")
    assert [run_config(name, 1, False).model.num_layers for name in cut] == [6, 6, 26, 13]
    assert "--qk-layernorm" in model_flags("Qwen3-8B")
    run = run_config("Qwen3-8B", 1, True)
    assert run.optim.use_precision_aware_optimizer and run.train.recompute_granularity == "full"
    assert (run.data.seq_length, run.train.global_batch_size, run.model.vocab_size) == (4096, 4, 151936)
    assert squares_of(Sizes.of("Qwen3-8B")) == pytest.approx(1895, rel=0.02)


def test_a_shape_that_does_not_fit_is_a_row() -> None:
    device = {"status": "ok", "name": "NVIDIA H200", "matmul_tflops": 790.0}
    row = {"shape": "Qwen3-8B", "engine": "trl", "packs_per_micro_batch": 1, "recompute": True, "status": "out of memory"}
    assert gpu.judged(dict(row), device) == row
    assert gpu.line_of(row).endswith("out of memory")
    good = gpu.judged({**row, "engine": "ours", "status": "ok", "tokens_per_s": 10_000.0, "peak_gib": 120.0}, device)
    assert good["passes"] and good["share_of_floor"] == pytest.approx(10_000 / 15_300, rel=0.02)
    assert gpu.line_of(good).endswith("(bar 65%): pass")
    slow = gpu.judged({**row, "engine": "ours", "status": "ok", "tokens_per_s": 9_000.0, "peak_gib": 120.0}, device)
    assert gpu.line_of(slow).endswith("(bar 65%): FAIL")
    assert list(gpu.ratios([good, {**slow, "engine": "trl"}])) == ["Qwen3-8B    ours / trl: 1.11x"]
