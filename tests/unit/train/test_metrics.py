"""Console line and metrics.jsonl."""

import json
import os
import re

import numpy as np
import pytest

from megatron_sft.config.log import LogConfig
from megatron_sft.config.run import CheckpointConfig, RunConfig
from megatron_sft.errors import TrainingError
from megatron_sft.train.metrics import MetricsWriter, console_line, keep_until, metrics_writer
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
    written = {**METRICS, "lm loss": 1.25}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == written
    numbers = {name: [(3, float(np.float32(value)))] for name, value in written.items()}
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


def test_the_mean_of_an_interval_stands_beside_the_loss_of_its_last_step(tmp_path):
    """Over the trained tokens since the line before, in files as on the console; a validation ends an interval too."""
    run = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)), log=LogConfig(log_interval=3))
    writer = MetricsWriter(run, 0, 7)
    for number, loss in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), start=1):
        more = {"valid/loss": 1.0} if number == 4 else {}
        writer.write({**METRICS, "iteration": number, "sft/loss": loss, "sft/trained_tokens": number, **more})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {line["iteration"]: line["lm loss"] for line in lines if "lm loss" in line}
    assert found == {3: (1 + 2 * 2 + 3 * 4) / 6, 4: 8.0, 6: (5 * 16 + 6 * 32) / 11, 7: 64.0}
    assert tensorboard_points(tmp_path / "tensorboard")["lm loss"] == [
        (number, float(np.float32(mean))) for number, mean in found.items()
    ]
