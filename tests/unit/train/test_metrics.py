"""Console line and metrics.jsonl."""

import json
import os
import re

import numpy as np
import pytest

from megatron_sft.config.run import CheckpointConfig, LogConfig, RunConfig
from megatron_sft.errors import TrainingError
from megatron_sft.train.metrics import MetricsWriter, _run_id, console_line, keep_until, metrics_writer
from tests.gloo import process_context


def tensorboard_points(folder):
    """{name: [(iteration, value)]} of an event folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


METRICS = {
    "iteration": 3,
    "consumed_samples": 24,
    "global_batch_size": 8,
    "sft/loss": 1.25,
    "sft/trained_tokens": 4000,
    "sft/epoch": 0.5,
    "grad_norm": 2.5,
    "lr": 1e-4,
    "perf/step_ms": 1500.04,
    "perf/tokens_per_s": 5461.3,
    "perf/tflops_per_gpu": 0.25,
}


def test_console_line_is_megatrons_with_ours_at_the_end():
    line = re.sub(r"^ \[.*?\]", "", console_line(METRICS, 10))
    assert line == (
        " iteration        3/      10 | consumed samples:           24 | elapsed time per iteration (ms): 1500.0 |"
        " throughput per GPU (TFLOP/s/GPU): 0.2 | learning rate: 1.000000E-04 | global batch size:     8 |"
        " lm loss: 1.250000E+00 | loss scale: 1.0 | grad norm: 2.500 | number of skipped iterations:   0 |"
        " number of nan iterations:   0 | tokens/s: 5461 | trained tokens: 4000 | epoch: 0.500 |"
        " step loss: 1.250000E+00 |"
    )
    assert " lm loss: 1.500000E+00 | " in console_line(METRICS, 10, 1.5)


def test_resumed_run_continues_the_file_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"itera')
    keep_until(path, 2)
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_lines_that_are_not_ours_neither_crash_nor_cut_the_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    foreign = [b"", b"note", b"[1]", b"7", b'{"iteration": "x"}', b'{"other": 9}', b"\xff\xfe", b"1" * 5000, b"[" * 100_000]
    ours = [b'{"iteration": %d}' % number for number in range(1, 5)]
    path.write_bytes(b"\n".join([ours[0], *foreign, *ours[1:]]))
    keep_until(path, 2)
    assert path.read_bytes().split(b"\n") == [ours[0], *foreign, ours[1], b""]
    keep_until(path, 0)
    assert path.read_bytes().split(b"\n") == [*foreign, b""]


def test_a_last_line_without_its_end_is_kept_where_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"iteration": 2}')
    keep_until(path, 2)
    assert path.read_bytes() == b'{"iteration": 1}\n{"iteration": 2}\n'


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_metrics_that_cannot_be_a_file_are_an_error(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    run = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))
    with pytest.raises(TrainingError, match=r"metrics\.jsonl and .* cannot be written"):
        MetricsWriter(run, 0, 10)


def _write_and_die(save):
    writer = MetricsWriter(RunConfig(checkpoint=CheckpointConfig(save=save)), 0, 10)
    writer.write(METRICS)
    os._exit(9)


def test_a_killed_process_loses_nothing_that_was_logged(tmp_path):
    process = process_context().Process(target=_write_and_die, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == METRICS
    numbers = {name: [(3, float(np.float32(value)))] for name, value in METRICS.items()}
    assert tensorboard_points(tmp_path / "tensorboard") == numbers


def test_the_writer_is_closed_when_a_run_fails(tmp_path):
    run = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))
    with pytest.raises(TrainingError, match="rank 1"), metrics_writer(run, 0, 0, 10) as write:
        write(METRICS)
        raise TrainingError("rank 1")
    with pytest.raises(ValueError, match="closed file"):
        write(METRICS)


def test_writer_has_one_object_an_iteration(tmp_path):
    run = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)), log=LogConfig(log_interval=100))
    writer = MetricsWriter(run, 0, 10)
    writer.write(METRICS)
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == METRICS
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path, monkeypatch):
    """Offline, by W&B as it is: each start leaves a folder offline-run-TIME-ID."""
    pytest.importorskip("wandb", reason="needs the package wandb: pip install 'megatron-sft[wandb]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for save, iteration in (("out", 0), ("out", 3), ("other", 0)):
        (tmp_path / save).mkdir(exist_ok=True)
        log = LogConfig(wandb_project="p", wandb_exp_name="name", wandb_group="g", wandb_mode="offline")
        writer = MetricsWriter(RunConfig(log=log, checkpoint=CheckpointConfig(save=str(tmp_path / save))), iteration, 10)
        writer.write({**METRICS, "iteration": iteration + 1})
        assert writer._wandb.config["train"]["micro_batch_size"] == 1
        assert (writer._wandb.project, writer._wandb.name, writer._wandb.group) == ("p", "name", "g")
        writer.close()
    kept = (tmp_path / "out" / "wandb_run_id.txt").read_text().strip()
    folders = [path.name for path in (tmp_path / "out" / "wandb").glob("offline-run-*")]
    assert folders and {name.rpartition("-")[2] for name in folders} == {kept}
    assert (tmp_path / "other" / "wandb_run_id.txt").read_text().strip() != kept


def test_the_id_of_a_wandb_run_is_kept_where_training_goes_on_and_new_where_it_begins(tmp_path):
    first = _run_id(tmp_path, 0)
    assert re.fullmatch("[0-9a-f]{8}", first)
    assert _run_id(tmp_path, 5) == first
    assert _run_id(tmp_path, 0) != first
    (tmp_path / "wandb_run_id.txt").write_text("../x")
    assert re.fullmatch("[0-9a-f]{8}", _run_id(tmp_path, 5))
