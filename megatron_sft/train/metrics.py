"""What a run prints and writes while it trains: console line or bar, metrics.jsonl, and the places of writers.py.

One flat dict per iteration goes to every place. Names: sft/* (data and loss), perf/*, data/* (loader), valid/*, and
Megatron's own `grad_norm` and `lr`. Only rank 0 writes.
"""

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_sft.config.run import RunConfig
from megatron_sft.errors import TrainingError
from megatron_sft.files import write_whole
from megatron_sft.log import logger
from megatron_sft.train.writers import open_writers

Metrics = Mapping[str, Any]
MEAN = "lm loss"
"""Megatron-LM's name of the mean since the console line before, over the trained tokens; where there is a line."""


def console_line(metrics: Metrics, train_iters: int, mean_loss: float | None = None) -> str:
    """The line that Megatron-LM prints (megatron/training/training.py:training_log), our fields at its end.

    Args:
        metrics: of one iteration; times in ms, loss in nats a trained token.
        train_iters: iterations of the whole run.
        mean_loss: over the trained tokens since the line before, as Megatron's "lm loss" is a mean; None: of this iteration.
    """
    loss = metrics["sft/loss"]
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    line = (
        f" [{now}] iteration {metrics['iteration']:8d}/{train_iters:8d} |"
        f" consumed samples: {metrics['consumed_samples']:12d} |"
        f" elapsed time per iteration (ms): {metrics['perf/step_ms']:.1f} |"
        f" throughput per GPU (TFLOP/s/GPU): {metrics['perf/tflops_per_gpu']:.1f} |"
        f" learning rate: {metrics['lr']:.6E} | global batch size: {metrics['global_batch_size']:5d} |"
        f" lm loss: {loss if mean_loss is None else mean_loss:.6E} | loss scale: 1.0 | grad norm: {metrics['grad_norm']:.3f} |"
        f" number of skipped iterations: {metrics.get('skipped_iterations', 0):3d} | number of nan iterations:   0 |"
        f" tokens/s: {metrics['perf/tokens_per_s']:.0f} | trained tokens: {metrics['sft/trained_tokens']} |"
        f" epoch: {metrics['sft/epoch']:.3f} | step loss: {loss:.6E} |"
    )
    line += "".join(f" {name}: {rate:.6E} |" for name, rate in metrics.items() if name.startswith("lr/"))
    if "valid/loss" in metrics:
        line += f" validation loss: {metrics['valid/loss']:.6E} |"
    return line


def keep_until(path: Path, iteration: int) -> None:
    """Cuts lines of later iterations off a metrics.jsonl, so that a resumed run continues the file it broke off.

    A half-written last line is cut off too; lines that are not of ours stay. The file is replaced in one step.
    """
    if not path.is_file():
        return
    *lines, last = path.read_bytes().split(b"\n")
    kept = [line for line in lines if not _is_after(line, iteration)]
    if last.endswith(b"}") and not _is_after(last, iteration):
        kept.append(last)
    write_whole(path, b"".join(line + b"\n" for line in kept))


def _is_after(line: bytes, iteration: int) -> bool:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    last = values.get("iteration") if isinstance(values, dict) else None
    return isinstance(last, int) and last > iteration


@contextlib.contextmanager
def metrics_writer(run: RunConfig, rank: int, iteration: int, train_iters: int) -> Iterator[Callable[[Metrics], None]]:
    """What writes the metrics of an iteration: MetricsWriter.write on rank 0, nothing elsewhere. Closed also when a run fails."""
    if rank != 0:
        yield lambda metrics: None
        return
    writer = MetricsWriter(run, iteration, train_iters)
    try:
        with logging_redirect_tqdm([logger]) if writer.bar else contextlib.nullcontext():
            yield writer.write
    except BaseException:
        with contextlib.suppress(TrainingError):  # of a full disk perhaps; the first error says more
            writer.close(exit_code=1)
        raise
    writer.close()


class MetricsWriter:
    """Writes the metrics of every iteration; made on rank 0 only.

    Args:
        run: log.tensorboard_dir, log.wandb_project and checkpoint.save say where to.
        iteration: the iteration that training starts after; later lines of an earlier attempt are cut off.
        train_iters: iterations of the whole run, for the console line.
    """

    def __init__(self, run: RunConfig, iteration: int, train_iters: int):
        self._log_interval = run.log.log_interval
        self._train_iters = train_iters
        self._jsonl = None
        save = run.checkpoint.save
        tensorboard = run.log.tensorboard_dir or (save and f"{save}/tensorboard")
        self._places = " and ".join(place for place in (save and f"{save}/metrics.jsonl", tensorboard) if place)
        with self._explained():
            if save:
                path = Path(save) / "metrics.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                keep_until(path, iteration)
                self._jsonl = open(path, "a", buffering=1, opener=_without_waiting)
            self._writers = open_writers(run, iteration, tensorboard)
        self._sums = [0.0, 0]  # of losses and trained tokens since the last line
        self._mean = 0.0
        self.bar = _bar(iteration, train_iters)

    def write(self, metrics: Metrics) -> None:
        """Writes one iteration: files always, the console line every log_interval iterations and on the last, or the bar."""
        metrics = self._with_mean(metrics)
        self._show(metrics)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        with self._explained():
            if self._jsonl:
                self._jsonl.write(json.dumps(metrics) + "\n")
            for writer in self._writers:
                writer.write(numbers, metrics["iteration"])

    def _with_mean(self, metrics: Metrics) -> Metrics:
        """Adds the mean of the interval that ends here, if one does."""
        iteration, tokens = metrics["iteration"], metrics["sft/trained_tokens"]
        self._sums = [self._sums[0] + tokens * metrics["sft/loss"], self._sums[1] + tokens]
        self._mean = self._sums[0] / self._sums[1] if self._sums[1] else 0.0
        if iteration % self._log_interval and iteration != self._train_iters and "valid/loss" not in metrics:
            return metrics
        self._sums, mean = [0.0, 0], self._mean
        return {**metrics, MEAN: mean}

    def _show(self, metrics: Metrics) -> None:
        if self.bar:
            self.bar.set_postfix_str(f"loss {self._mean:.4f}, {metrics['perf/tokens_per_s']:,.0f} tokens/s", refresh=False)
            self.bar.update()
            if "valid/loss" in metrics:
                logger.info("iteration %d: validation loss %.4f", metrics["iteration"], metrics["valid/loss"])
        elif MEAN in metrics:
            logger.info(console_line(metrics, self._train_iters, metrics[MEAN]))

    def close(self, exit_code: int = 0) -> None:
        """Flushes and closes every place; Weights & Biases and others show a run with another exit code than 0 as failed."""
        if self.bar:
            self.bar.close()
        with self._explained():
            if self._jsonl:
                self._jsonl.close()
            for writer in self._writers:
                writer.close(exit_code)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self._places}: cannot be written ({error.strerror}); expected a writable folder with room. Make room and "
                "give the same command again: the run goes on from its last checkpoint."
            ) from None


def _bar(iteration: int, train_iters: int) -> "tqdm[Any] | None":
    """In a terminal: how far the run is, and how long it still takes."""
    if not sys.stdout.isatty():
        return None
    form = "{desc} {n}/{total} |{bar}| {elapsed} gone, {remaining} left{postfix}"
    return tqdm(initial=iteration, total=train_iters, desc="step", bar_format=form, file=sys.stdout, dynamic_ncols=True)


def _without_waiting(path: str, flags: int) -> int:
    """Opens for `open`; a FIFO that nobody reads is an error, not a wait."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
