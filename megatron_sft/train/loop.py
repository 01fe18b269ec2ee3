"""The training loop: step, validate, log, save, stop. Reads top to bottom; everything else is called from here."""

import datetime
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sft.config.run import RunConfig
from megatron_sft.data.loader import Step, TrainLoader, ValidLoader, steps_of_samples
from megatron_sft.errors import TrainingError
from megatron_sft.log import logger
from megatron_sft.model.flops import peak_tflops, train_flops
from megatron_sft.parallel import Ranks
from megatron_sft.train import memory
from megatron_sft.train.benchmarks import Benchmarks, is_less_better
from megatron_sft.train.evaluate import bits_per_byte, evaluate
from megatron_sft.train.loss import LossTotals
from megatron_sft.train.metrics import metrics_writer
from megatron_sft.train.optim import ScheduleLengths, rates, whole_parameters
from megatron_sft.train.state import TrainState
from megatron_sft.train.step import Noise, StepResult, train_step

SAME_SIGNAL_S = 2.0
"""Ctrl-C comes from the terminal and from the launcher, a time limit's SIGTERM from Slurm and from the launcher."""


@dataclass(frozen=True)
class Job:
    """Everything that a run needs, built once by finetune.py."""

    run: RunConfig
    ranks: Ranks
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    schedule: ScheduleLengths
    loader: TrainLoader
    valid_loader: ValidLoader | None
    source_names: Sequence[str]
    name_document: Callable[[int], str]
    save: Callable[[TrainState, float | None], None]
    """Writes a checkpoint; the number is --best-metric at it, where that was taken."""
    benchmarks: Benchmarks | None = None
    valid_bytes: np.ndarray | None = None
    """Bytes of text that a validation takes the loss of, by source of valid_loader. int64"""


class StopRequest:
    """SIGTERM, SIGINT, the end of --exit-duration-in-mins or --exit-interval: the loop finishes its step, saves and ends.

    Every rank asks at every step, because a signal may reach some of them only. A second signal ends the process at once.
    """

    def __init__(self, run: RunConfig):
        self._signal = 0
        self._signalled = 0.0
        self._interval = run.train.exit_interval
        self._group: Any = None
        """Talks between hosts, so that the device is not waited for: gloo's, and None where that is what all processes have."""
        if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "gloo":
            timeout = datetime.timedelta(minutes=run.parallel.distributed_timeout_minutes)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        minutes = run.train.exit_duration_in_mins
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        if run.train.exit_signal_handler:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal and now - self._signalled > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal, self._signalled = number, self._signalled if self._signal else now

    def agreed(self, iteration: int, peak_bytes: int) -> tuple[int, int]:
        """The signal number that any rank received, -1 when it is time, 0 to go on; and the most memory of any rank.

        The same on every rank, by one all-reduce over gloo.
        """
        is_time = time.monotonic() > self._deadline or bool(self._interval and iteration % self._interval == 0)
        mine = self._signal or (1000 if is_time else 0)
        values = torch.tensor([mine, peak_bytes], dtype=torch.int64, device="cpu")
        if dist.get_world_size() > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        number, most = values.tolist()
        return -1 if number == 1000 else number, most


def train(job: Job, state: TrainState) -> tuple[TrainState, int]:
    """Trains until the run's length, a stop signal or an error.

    Args:
        job: what to train with.
        state: where to go on; job.loader starts at state.consumed_samples.

    Returns:
        The last state, and why training ended: 0 at its end, a signal's number, -1 for --exit-duration-in-mins or
        --exit-interval.
    """
    run, stop, stopped = job.run, StopRequest(job.run), 0
    last_iteration = len(job.loader)
    if job.benchmarks and not state.iteration:
        with whole_parameters(job.chunks, run.parallel):
            job.benchmarks.sample(job.chunks, job.ranks, 0)
    with metrics_writer(run, job.ranks.rank, state.iteration, last_iteration) as write:
        clock = time.perf_counter()
        for step in job.loader:
            lr = rates(job.optimizer, job.scheduler)
            limit = state.loss_limit(run.train.loss_spike_factor)
            alpha = run.train.neftune_noise_alpha
            result = train_step(
                job.chunks,
                job.optimizer,
                step.micro_batches,
                len(job.source_names),
                job.name_document,
                run.train.check_for_nan,
                state.iteration + 1,
                limit,
                Noise(alpha, run.train.seed, state.iteration) if alpha else None,
            )
            if result.spike:
                _meet_spike(job, state, result.spike)
            scheduled = schedule_position(job.schedule, job.loader, state)
            state = _advanced(state, step, result, limit)
            job.scheduler.step(schedule_position(job.schedule, job.loader, state) - scheduled)
            metrics = step_metrics(job, step, state, result, lr, seconds=time.perf_counter() - clock)
            stopped, peak_bytes = stop.agreed(state.iteration, memory.peak_bytes())
            metrics |= {"perf/peak_memory_gb": peak_bytes / 1e9, **utilisation(run, metrics["perf/tflops_per_gpu"])}
            ends = bool(stopped) or state.iteration == last_iteration
            if job.valid_loader and (state.iteration % run.train.eval_interval == 0 or ends):
                with whole_parameters(job.chunks, run.parallel):
                    metrics |= valid_metrics(job, evaluate(job.chunks, job.valid_loader))
            if job.benchmarks and job.benchmarks.is_due(state.iteration, state.iteration == last_iteration):
                with whole_parameters(job.chunks, run.parallel):
                    metrics |= job.benchmarks.answer(job.chunks, job.ranks, state.iteration)
            write(metrics)
            value = metrics.get(run.checkpoint.best_metric)
            state = state if value is None else _judged(run, state, value)
            ends = ends or state.is_stale(run.train.early_stop_patience)
            interval = run.checkpoint.save_interval
            if run.checkpoint.save and (ends or (interval and state.iteration % interval == 0)):
                with whole_parameters(job.chunks, run.parallel):
                    job.save(state, value)
            if ends:
                break
            clock = time.perf_counter()
    return state, stopped


def schedule_position(schedule: ScheduleLengths, loader: TrainLoader, state: TrainState) -> int:
    """Where a state stands in the learning rate's schedule, in its unit."""
    steps = steps_of_samples(state.consumed_samples, loader.num_packs, loader.global_batch_size)
    return schedule.position(state.iteration, state.consumed_samples, steps)


def _advanced(state: TrainState, step: Step, result: StepResult, limit: float) -> TrainState:
    """The state after a step; a skipped one used its data up all the same."""
    totals = result.totals
    state = replace(
        state,
        iteration=state.iteration + 1,
        consumed_samples=state.consumed_samples + step.num_samples,
        tokens_seen=state.tokens_seen + totals.tokens,
        trained_tokens=state.trained_tokens + totals.trained_tokens,
        skipped_iterations=state.skipped_iterations + bool(result.spike),
        order_batch_size=step.order_batch_size,
    )
    return state.with_loss(totals.loss, limit) if totals.trained_tokens else state


def _judged(run: RunConfig, state: TrainState, value: float) -> TrainState:
    """The state after an evaluation; says so where training ends with it."""
    metric, patience = run.checkpoint.best_metric, run.train.early_stop_patience
    state = state.with_metric(metric, value, is_less_better(metric))
    if state.is_stale(patience):
        best = f"{state.best_value:.6f} at iteration {state.best_iteration}"
        logger.info("ending: %s is no better than %s since %s evaluations (--early-stop-patience).", metric, best, patience)
    return state


def _meet_spike(job: Job, state: TrainState, spike: str) -> None:
    """Collective: says that a step was skipped, or saves the state before it and raises TrainingError."""
    factor = job.run.train.loss_spike_factor
    if job.run.train.loss_spike_action == "skip":
        logger.warning("%s (--loss-spike-factor %g x the running mean): not applied, training goes on.", spike, factor)
        return
    if job.run.checkpoint.save:
        with whole_parameters(job.chunks, job.run.parallel):
            job.save(state, None)
    raise TrainingError(
        f"{spike}. Expected at most {factor:g} x the running mean (--loss-spike-factor). Nothing was updated in this step; "
        f"the state before it, iteration {state.iteration}, is {'' if job.run.checkpoint.save else 'not '}saved. "
        "Look at the rows, lower --lr, or go on with --loss-spike-action skip."
    )


def step_metrics(
    job: Job, step: Step, state: TrainState, result: StepResult, lr: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """The flat dict of one iteration, the same on every rank. Times in ms, losses in nats a trained token."""
    totals = result.totals
    flops = train_flops(job.run.model, step.lengths, totals.trained_tokens)
    return {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "global_batch_size": step.num_samples,
        **loss_metrics("sft", totals, job.source_names),
        "sft/per_token_loss": totals.loss,
        "sft/trained_tokens": totals.trained_tokens,
        "sft/tokens_seen": state.tokens_seen,
        "sft/epoch": step.epoch,
        "grad_norm": result.grad_norm,
        "lr": lr["lr"],
        "perf/step_ms": 1000 * seconds,
        "perf/tokens_per_s": totals.tokens / seconds,
        "perf/tflops_per_gpu": flops / seconds / job.ranks.world_size / 1e12,
        "data/prefetch_queue_depth": job.loader.queue_depth,
        "data/wait_ms": job.loader.wait_ms,
        "skipped_iterations": state.skipped_iterations,
        **{name: rate for name, rate in lr.items() if name != "lr"},
    }


def utilisation(run: RunConfig, tflops: float) -> Mapping[str, float]:
    """perf/mfu, the share of the device's bf16 peak, where it is known and that is what the run computes in."""
    if run.train.params_dtype != "bf16" or not torch.cuda.is_available():
        return {}
    peak = peak_tflops(torch.cuda.get_device_name())
    return {"perf/mfu": tflops / peak} if peak else {}


def loss_metrics(prefix: str, totals: LossTotals, names: Sequence[str]) -> Mapping[str, float]:
    """{prefix}/loss, and {prefix}/loss/<source> for each source that the step holds when there are several."""
    metrics = {f"{prefix}/loss": totals.loss}
    if len(names) > 1:
        for index, name in enumerate(names):
            loss = totals.source_loss(index)
            if loss is not None:
                metrics[f"{prefix}/loss/{name}"] = loss
    return metrics


def valid_metrics(job: Job, totals: LossTotals) -> Mapping[str, float]:
    """valid/loss and valid/bits_per_byte, in all and by source."""
    assert job.valid_loader is not None and job.valid_bytes is not None, "made together"
    names = job.valid_loader.dataset.store.source_names
    return {**loss_metrics("valid", totals, names), **bits_per_byte(totals, job.valid_bytes, list(names))}
