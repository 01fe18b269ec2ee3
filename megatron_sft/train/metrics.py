"""What a run prints and writes while it trains: console line, metrics.jsonl, TensorBoard, Weights & Biases.

One flat dict an iteration goes to every place. Names: sft/* (data and loss), perf/*, data/* (loader), valid/*, and
Megatron's own `grad_norm` and `lr`. Only rank 0 writes.
"""

import contextlib
import datetime
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_sft.config.run import RunConfig
from megatron_sft.errors import ConfigError, TrainingError
from megatron_sft.files import write_whole
from megatron_sft.log import logger

Metrics = Mapping[str, Any]
RUN_ID = "wandb_run_id.txt"
"""In the --save folder."""


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
    found = values.get("iteration") if isinstance(values, dict) else None
    return isinstance(found, int) and found > iteration


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
            self._tensorboard = _tensorboard(tensorboard, iteration)
            self._wandb = _wandb(run, iteration)
        self._sums = [0.0, 0]  # of losses and trained tokens since the last line
        self.bar = _bar(iteration, train_iters)

    def write(self, metrics: Metrics) -> None:
        """Writes one iteration: files always, the console line every log_interval iterations and on the last, or the bar."""
        iteration = metrics["iteration"]
        self._show(metrics)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        with self._explained():
            if self._jsonl:
                self._jsonl.write(json.dumps(metrics) + "\n")
            if self._tensorboard:
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, iteration)
                self._tensorboard.flush()  # by itself it does so every 2 minutes, which a killed process may not live
        if self._wandb:
            self._wandb.log(numbers)

    def _show(self, metrics: Metrics) -> None:
        iteration, tokens = metrics["iteration"], metrics["sft/trained_tokens"]
        self._sums = [self._sums[0] + tokens * metrics["sft/loss"], self._sums[1] + tokens]
        mean = self._sums[0] / self._sums[1] if self._sums[1] else 0.0
        if self.bar:
            self.bar.set_postfix_str(f"loss {mean:.4f}, {metrics['perf/tokens_per_s']:,.0f} tokens/s", refresh=False)
            self.bar.update()
            if "valid/loss" in metrics:
                logger.info("iteration %d: validation loss %.4f", iteration, metrics["valid/loss"])
        is_shown = iteration % self._log_interval == 0 or iteration == self._train_iters or "valid/loss" in metrics
        if is_shown:
            self._sums = [0.0, 0]
        if is_shown and not self.bar:
            logger.info(console_line(metrics, self._train_iters, mean))

    def close(self, exit_code: int = 0) -> None:
        """Flushes and closes every place; Weights & Biases shows a run with another exit code than 0 as failed."""
        if self.bar:
            self.bar.close()
        with self._explained():
            if self._jsonl:
                self._jsonl.close()
            if self._tensorboard:
                self._tensorboard.close()
        if self._wandb:
            self._wandb.finish(exit_code=exit_code)

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


def _tensorboard(folder: str | None, iteration: int) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError([f"--tensorboard-dir {folder} needs tensorboard ({error}). Run: pip install tensorboard"]) from None
    return SummaryWriter(folder, purge_step=iteration + 1)


def _wandb(run: RunConfig, iteration: int) -> Any:
    """The W&B run: the same one again for a run that goes on from a checkpoint, by the id in its --save folder."""
    if run.log.wandb_project is None:
        return None
    import wandb  # problems.py says what to install where it is missing

    log, save = run.log, run.checkpoint.save
    run_id = _run_id(Path(save), iteration) if save else None
    try:
        started = wandb.init(
            project=log.wandb_project,
            name=log.wandb_exp_name,
            group=log.wandb_group,
            mode=log.wandb_mode,
            config=json.loads(run.to_json()),
            dir=save,
            id=run_id,
            resume="allow" if run_id else None,
        )
    except (wandb.errors.Error, OSError) as error:
        project = f"--wandb-project {log.wandb_project}: {str(error).rstrip('.')}"
        raise ConfigError([f"{project}. Expected a run of W&B. Log in (wandb login), or use --wandb-mode offline."]) from None
    started.define_metric("iteration")
    started.define_metric("*", step_metric="iteration")  # W&B's own steps never go back, as a resumed run may
    return started


def _run_id(save: Path, iteration: int) -> str:
    """The id in the --save folder; a new one, which is kept there, where training begins."""
    file = save / RUN_ID
    known = file.read_text(encoding="ascii").strip() if iteration and file.is_file() else ""
    if re.fullmatch("[0-9a-f]{8}", known):
        return known
    new = secrets.token_hex(4)
    write_whole(file, new + "\n")
    return new
