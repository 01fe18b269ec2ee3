"""Saves and loads checkpoints of training in Megatron's folders and megatron-core's torch_dist format.

A save, in this order (every step collective, so that all processes agree on its outcome):
1. the state dict of the run (state.py) is divided into what each process writes (torch_dist.py);
2. each process writes its files into .saving_iter_%07d and checksums them (manifest.py);
3. rank 0 adds .metadata, common.pt, run_config.json and, last, manifest.json;
4. rank 0 renames the folder to iter_%07d, replaces the tracker and deletes what --save-retain no longer covers.
A reader sees whole checkpoints only. A failure on any process ends as CheckpointError on all, with nothing left behind.
"""

import json
import os
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sft.checkpoint import background, manifest, optimizer_shards, torch_dist, tracker
from megatron_sft.checkpoint import state as state_dicts
from megatron_sft.checkpoint.background import torch_optimizers
from megatron_sft.checkpoint.lock import Lock
from megatron_sft.checkpoint.resume import run_config_json
from megatron_sft.config.run import RunConfig
from megatron_sft.errors import CheckpointError, SavingError
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks, agree, gather

_ADVICE = "Earlier checkpoints are untouched; mend it and resume."
_NONE_LEFT = "Expected a whole one. Restore one from a copy, or choose another folder."
T = TypeVar("T")
Exchange = Callable[[Any], list[Any]]
"""Gives every process everybody's value, by rank."""


class CheckpointSaver:
    """Writes the checkpoints of one run.

    Args:
        root: folder of the checkpoints, made when missing.
        run: its `checkpoint` says what is kept; all of it is written beside every checkpoint.
        ranks: of this process.
        lock: of the root; nothing is written when it is lost. None: nobody else writes there.
        went_on_from: iteration of the root that the run resumed; None: of none.
    """

    def __init__(self, root: str | Path, run: RunConfig, ranks: Ranks, lock: Lock | None = None, went_on_from: int | None = None):
        self.root = Path(root)
        self._went_on_from = went_on_from
        self._lock = lock or Lock(None)
        self._run = run
        self._ranks = ranks
        self._staging = background.Staging()
        self._pending: _BackgroundSave | None = None
        self._number = 0
        _agree(self._prepare_root, ranks, f"{self.root}: cannot be used for checkpoints", kind=CheckpointError)

    def _prepare_root(self) -> None:
        if self._ranks.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            tracker.sweep(self.root)

    def save(
        self,
        iteration: tracker.Iteration,
        chunks: list[Any],
        optimizer: Any | None,
        scheduler: Any | None,
        state: dict[str, Any],
    ) -> None:
        """Collective: writes one checkpoint; with run.checkpoint.async_save it returns while threads still write.

        An asynchronous save ends by itself; `finish` waits for it, and so does the next save.

        Args:
            iteration: optimizer steps done, or "release".
            chunks: model chunks of this process.
            optimizer: megatron-core's, or None for weights alone.
            scheduler: megatron-core's, or None.
            state: progress of the run: numbers, strings, lists, dicts and tensors; the same on every process.

        Raises:
            SavingError: on every process, when it failed on any; earlier checkpoints are untouched.
        """
        self.finish()
        self._number += 1
        where = f"{tracker.checkpoint_folder(self.root, iteration)}: not saved"
        _agree(lambda: self._make(iteration), self._ranks, where)
        has_states = optimizer is not None and any(part.state for part in torch_optimizers(optimizer))
        if not (self._run.checkpoint.save_optim and any(gather(has_states))):  # a rank may train nothing
            optimizer = None  # before the first step there is nothing in it
        sharded = self._run.parallel.use_distributed_optimizer
        metadata = state_dicts.content_metadata(sharded, state_dicts.layers_differ(chunks, self._run.optim))
        full = self._state_dict(iteration, chunks, optimizer, scheduler, state, metadata)
        parts = state_dicts.own_shards(optimizer, metadata)
        shards = optimizer_shards.write_items(parts, state_dicts.model_state(chunks, metadata)) if parts else []
        job = torch_dist.plan(full, validate=self._number == 1, shards=shards)
        config = run_config_json(self._run, state).encode()
        if self._run.checkpoint.async_save:
            background.detach_buffers(job, chunks)
            self._pending = _BackgroundSave(self, iteration, job, config, optimizer, where)
        else:
            self._write(iteration, job, config, where, gather)

    def finish(self) -> None:
        """Collective: waits for a save in the background.

        Raises:
            SavingError: it failed.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        _agree(pending.result, self._ranks, pending.where)
        pending.exchange.forget()

    def mark_best(self, iteration: int, metric: str, value: float) -> None:
        """Names the best checkpoint so far, on rank 0; it is kept by --save-retain."""
        if self._ranks.rank == 0:
            try:
                tracker.mark_best(self.root, iteration, metric, value)
            except OSError as error:
                raise SavingError(
                    f"{self.root}: iteration {iteration} is saved, but cannot be named the best one ({error.strerror}). Expected "
                    f"a writable folder with room. {_ADVICE}"
                ) from None

    def _make(self, iteration: tracker.Iteration) -> None:
        if self._ranks.rank == 0:
            self._lock.require()
            folder = tracker.saving_folder(self.root, iteration)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def _state_dict(
        self,
        iteration: tracker.Iteration,
        chunks: list[Any],
        optimizer: Any,
        scheduler: Any,
        state: dict[str, Any],
        metadata: dict[str, Any],
    ) -> dict[str, Any]:
        number = 0 if iteration == tracker.RELEASE else int(iteration)
        full = state_dicts.sharded_state(chunks, optimizer, scheduler, metadata, is_loading=False)
        if self._run.checkpoint.save_rng:
            full[state_dicts.RNG_KEY] = state_dicts.rng_state(self._ranks)
        full["args"] = state_dicts.megatron_args(self._run, self._ranks, number, state)
        full["args"].no_save_optim = optimizer is None
        full["checkpoint_version"] = 3.0
        full["iteration"] = number
        full["num_floating_point_operations_so_far"] = state.get("num_floating_point_operations_so_far", 0)
        full["content_metadata"] = metadata
        full[state_dicts.TRAIN_STATE] = dict(state)
        return full

    def _write(
        self,
        iteration: tracker.Iteration,
        job: torch_dist.WriteJob,
        config: bytes,
        where: str,
        exchange: Exchange,
    ) -> None:
        """Writes and publishes; the whole of a save that may run in a thread."""
        folder = tracker.saving_folder(self.root, iteration)
        ranks, threads = self._ranks, background.writer_threads(self._ranks.world_size)
        try:
            own = _agree(lambda: torch_dist.write_items(folder, job, ranks.rank, threads), ranks, where, exchange)
            written = exchange(own)
            _agree(lambda: self._complete(iteration, folder, job, config, written), ranks, where, exchange)
        except CheckpointError:
            if ranks.rank == 0 and self._lock.is_mine():  # otherwise the folder is perhaps another run's by now
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _complete(
        self, iteration: tracker.Iteration, folder: Path, job: torch_dist.WriteJob, config: bytes, written: list[Any]
    ) -> None:
        """Rank 0 completes the folder and publishes it."""
        if self._ranks.rank != 0:
            return
        records = torch_dist.write_metadata(folder, job, [results for results, _ in written])
        records.append(manifest.write_file(folder / manifest.RUN_CONFIG, config))
        manifest.write_manifest(folder, [*records, *(record for _, files in written for record in files)])
        self._lock.require()
        tracker.publish(self.root, iteration, self._went_on_from)
        self._went_on_from = None
        tracker.retain(self.root, self._run.checkpoint.save_retain)


class _BackgroundSave:
    """One asynchronous save: a thread that copies, writes and publishes. It dies with the process."""

    def __init__(
        self,
        saver: CheckpointSaver,
        iteration: tracker.Iteration,
        job: torch_dist.WriteJob,
        config: bytes,
        optimizer: Any,
        where: str,
    ):
        ranks = saver._ranks
        timeout_s = 60.0 * saver._run.parallel.distributed_timeout_minutes
        self.exchange = background.StoreExchange(str(saver._number), ranks.rank, ranks.world_size, timeout_s)
        self.where = where
        self._outcome = background.Outcome()
        self._copied = threading.Event()
        self._ready = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, args=(saver, iteration, job, config), daemon=True)
        self._thread.start()
        inner = torch_optimizers(optimizer) if optimizer is not None else []
        self._hooks = [part.register_step_pre_hook(lambda *_: self._wait_for_copy()) for part in inner]
        if not inner:
            self._wait_for_copy()

    def _run(self, saver: CheckpointSaver, iteration: tracker.Iteration, job: torch_dist.WriteJob, config: bytes) -> None:
        with self._outcome:
            try:
                if self._ready is not None:
                    torch.cuda.set_device(saver._ranks.local_rank)
                job.items = saver._staging.copy(job.items, self._ready)
            finally:
                self._copied.set()
            saver._write(iteration, job, config, self.where, self.exchange)

    def _wait_for_copy(self) -> None:
        self._copied.wait()
        while self._hooks:
            self._hooks.pop().remove()

    def result(self) -> None:
        """Waits; raises what the thread raised."""
        self._wait_for_copy()
        self._thread.join()
        self._outcome.raise_again()


def _agree(
    action: Callable[[], T],
    ranks: Ranks,
    where: str,
    exchange: Exchange = gather,
    kind: type[CheckpointError] = SavingError,
) -> T:
    """parallel.agree for what writes: an error of this process becomes one of that kind, which begins with `where`."""

    def explained() -> T:
        try:
            return action()
        except OSError as error:
            raise kind(f"{where}. Found: rank {ranks.rank}: {error}. Expected a writable folder with room. {_ADVICE}") from error

    return agree(explained, exchange)


def save_checkpoint(
    root: str | Path,
    iteration: tracker.Iteration,
    chunks: list[Any],
    optimizer: Any | None,
    scheduler: Any | None,
    state: dict[str, Any],
    run: RunConfig,
    ranks: Ranks,
    lock: Lock | None = None,
) -> None:
    """Collective: writes one checkpoint. A run that saves more than once keeps a CheckpointSaver instead."""
    saver = CheckpointSaver(root, run, ranks, lock)
    saver.save(iteration, chunks, optimizer, scheduler, state)
    saver.finish()


def load_checkpoint(
    root: str | Path,
    chunks: list[Any],
    optimizer: Any | None,
    scheduler: Any | None,
    ranks: Ranks,
    iteration: tracker.Iteration | None = None,
    weights_only: bool = False,
    load_rng: bool = True,
    verify: bool = True,
) -> dict[str, Any]:
    """Collective: loads the newest usable checkpoint into the model, the optimizer, the scheduler and the generators.

    Args:
        root: folder with iter_%07d or release folders.
        chunks: model chunks of this process, any layout.
        optimizer: megatron-core's, or None.
        scheduler: megatron-core's, or None.
        ranks: of this process.
        iteration: which one; None: the tracker's, or the newest before it that is not damaged (with a message).
        weights_only: the model alone (--finetune); the optimizer takes its master weights from it.
        load_rng: restore the generators where tensor and pipeline sizes are the checkpoint's.
        verify: checksum every file before it is used; False looks at sizes only.

    Returns:
        What was given to `save` as `state`, with at least iteration and consumed_train_samples.

    Raises:
        CheckpointError: there is no usable checkpoint, or it is of another model.
    """
    root = Path(root)
    chosen = _choose(root, iteration, ranks, verify)
    folder = tracker.checkpoint_folder(root, chosen)
    release = chosen == tracker.RELEASE
    whole = not weights_only and not release
    state = _load(folder, chunks, optimizer if whole else None, scheduler if whole else None, ranks, load_rng and whole)
    if optimizer is not None and not whole:
        optimizer.reload_model_params()
    if not whole:
        state.update(iteration=0, consumed_train_samples=0)
    if whole:
        logger.info("loaded checkpoint %s at iteration %s", folder, state["iteration"])
    else:
        logger.info("loaded the weights of %s; nothing else of it is taken", folder)
    return state


def _choose(root: Path, iteration: tracker.Iteration | None, ranks: Ranks, verify: bool) -> tracker.Iteration:
    """Collective: the first candidate without a problem; all processes check a share of its files."""
    listed = gather([iteration] if iteration is not None else tracker.candidates(root))[0]
    if iteration is None and listed and tracker.read_tracker(root) is None:
        logger.warning("%s: says no iteration (missing or damaged); the newest is taken.", root / tracker.TRACKER)
    found: list[str] = []
    for candidate in listed:
        folder = tracker.checkpoint_folder(root, candidate)
        outcomes = gather(_problems(folder, verify, (ranks.rank, ranks.world_size)))
        problems = sorted({text for outcome in outcomes for text in outcome})
        if not problems:
            return candidate
        found += problems[:3]
        if ranks.rank == 0:
            logger.warning("%s is not usable and is skipped: %s", folder, "; ".join(problems[:3]))
    if not listed:
        raise CheckpointError(
            f"{root}: found no {tracker.TRACKER} and no iter_* or release folder. Expected a Megatron checkpoint. "
            "Check the path given to --load."
        )
    raise CheckpointError(f"{root}: no usable checkpoint. Found: {'; '.join(found)}. {_NONE_LEFT}")


def _load(folder: Path, chunks: list[Any], optimizer: Any, scheduler: Any, ranks: Ranks, load_rng: bool) -> dict[str, Any]:
    metadata, common = agree(lambda: _headers(folder))
    args, content = common["args"], common["content_metadata"]
    without_states = optimizer if getattr(args, "no_save_optim", False) else None
    optimizer = None if without_states is not None else optimizer
    content, known = state_dicts.content_for(optimizer, content), torch_dist.sharded_keys(metadata)
    wanted = state_dicts.sharded_state(chunks, optimizer, None, content, is_loading=True)
    if optimizer is not None:
        common["optimizer"] = state_dicts.optimizer_settings(wanted["optimizer"], common.get("optimizer"))
        optimizer_shards.take_names(wanted["optimizer"], known)
    rng = state_dicts.rng_state(ranks)
    if load_rng and rng.unique_key in known:
        wanted[state_dicts.RNG_KEY] = rng
    elif load_rng and ranks.rank == 0:
        logger.info("%s: random states are of another layout; the seed's are used.", folder)
    loaded = agree(lambda: torch_dist.read_state(folder, wanted, metadata, common))
    for index, chunk in enumerate(chunks):
        state_dicts.unwrap(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"], strict=True)
    if without_states is not None:
        without_states.reload_model_params()
    shards: list[optimizer_shards.Box] = []
    if optimizer is not None and any(group["params"] for group in optimizer.param_groups):  # a rank may train nothing
        with torch.no_grad():  # fp32: megatron-core copies into views of the parameters (dp_reshardable, Megatron-LM's default)
            optimizer.load_state_dict(loaded["optimizer"])
            if parts := state_dicts.own_shards(optimizer, content):
                shards = optimizer_shards.names_of_others(
                    optimizer_shards.boxes(parts, state_dicts.model_state(chunks, content)), known
                )
    with torch.no_grad():
        agree(lambda: torch_dist.read_with(optimizer_shards.BoxPlanner(folder, shards), folder, metadata))
    if scheduler is not None and "opt_param_scheduler" in loaded:
        agree(lambda: _restore_scheduler(folder, scheduler, loaded["opt_param_scheduler"]))
    agree(lambda: _restore_rng(folder, loaded.get(state_dicts.RNG_KEY)))
    state = dict(loaded[state_dicts.TRAIN_STATE])
    state["iteration"] = loaded["iteration"]
    state.setdefault("consumed_train_samples", getattr(args, "consumed_train_samples", 0) or 0)
    return state


def _headers(folder: Path) -> tuple[Metadata, dict[str, Any]]:
    """.metadata and the common state, which has what _load asks it for, of the kind that it should be."""
    metadata = torch_dist.read_metadata(folder)
    common = torch_dist.read_common(folder, metadata)
    common["content_metadata"] = common.get("content_metadata") or state_dicts.content_metadata(True)
    kinds: dict[str, tuple[type, Any]] = {
        "args": (Namespace, Namespace()),
        "content_metadata": (dict, {}),
        "iteration": (int, 0),
        state_dicts.TRAIN_STATE: (dict, {}),
    }
    for name, (kind, default) in kinds.items():
        if type(common.setdefault(name, default)) is not kind:
            raise CheckpointError(f"{folder}: its {name} is no {kind.__name__}. Expected a torch_dist checkpoint. Restore it.")
    for name in ("consumed_train_samples", "global_batch_size", "micro_batch_size", "data_parallel_size"):
        if type(getattr(common["args"], name, 0)) not in (int, type(None)):
            raise CheckpointError(f"{folder}: its {name} is no number. Expected a torch_dist checkpoint. Restore it.")
    return metadata, common


def _restore_scheduler(folder: Path, scheduler: Any, values: Any) -> None:
    scheduler.num_steps = 0  # its load_state_dict adds to what is there
    try:
        scheduler.load_state_dict(values)
    except (AssertionError, LookupError, TypeError) as error:  # of a value that is missing, or another one than the flags'
        raise CheckpointError(
            f"{folder}: its learning-rate schedule cannot be restored: {error}. Expected megatron-core's. Restore the checkpoint "
            "from a copy, or load the weights alone with --finetune."
        ) from error


def _restore_rng(folder: Path, states: Any) -> None:
    if states is None:
        return
    try:
        state_dicts.restore_rng(states)
    except (
        TypeError,
        ValueError,
        LookupError,
        RuntimeError,
        OverflowError,
    ) as error:  # what the generators say of what they cannot take
        raise CheckpointError(
            f"{folder}: its random states cannot be restored: {error}. Expected those of every generator. Restore the "
            "checkpoint from a copy, or go on without them: --no-load-rng."
        ) from error


def _problems(folder: Path, content: bool, share: tuple[int, int] = (0, 1)) -> list[str]:
    """manifest.problems, and that one of ours has its manifest: what it keeps of training stands in no other's common state."""
    problems = manifest.problems(folder, content, share)
    if problems or share[0] or os.path.lexists(folder / manifest.MANIFEST):
        return problems
    try:
        is_ours = state_dicts.TRAIN_STATE in torch_dist.read_common(folder)
    except CheckpointError:  # whoever loads it says so
        return []
    return [f"{folder}: no {manifest.MANIFEST}; expected the one that was written with it"] if is_ours else []


def latest_iteration(root: str | Path, wanted: int | None = None) -> tracker.Iteration | None:
    """The checkpoint that load_checkpoint tries first and that looks whole; None when there is none at all.

    Args:
        root: folder of the checkpoints.
        wanted: the iteration that it must be (--ckpt-step); None: any.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged, or `wanted` is not there.
    """
    root = Path(root)
    listed = tracker.candidates(root)
    if wanted is not None and wanted not in listed:
        there = ", ".join(map(str, listed)) or "none"
        raise CheckpointError(
            f"{root}: no checkpoint of iteration {wanted}; there: {there}. Change --ckpt-step, or leave it out."
        )
    listed = listed if wanted is None else [wanted]
    found: list[str] = []
    for candidate in listed:
        problems = _problems(tracker.checkpoint_folder(root, candidate), content=False)
        if not problems:
            return candidate
        found += problems
    if listed:
        raise CheckpointError(f"{root}: no usable checkpoint. Found: {'; '.join(found[:5])}. {_NONE_LEFT}")
    return None


def read_run_config(root: str | Path, wanted: int | None = None) -> dict[str, Any]:
    """The resolved configuration that latest_iteration's checkpoint was written with; {} for one of Megatron-LM.

    It is read after its checksum was compared: what is damaged is never used, nor is it an error while an earlier
    checkpoint is whole.
    """
    chosen = latest_iteration(root, wanted)
    if chosen is None:
        return {}
    path = tracker.checkpoint_folder(Path(root), chosen) / manifest.RUN_CONFIG
    if not path.is_file():
        return {}
    config = dict(json.loads(path.read_text(encoding="utf-8")))
    train = config.get("train", {})
    if chosen != tracker.RELEASE and not train.get("global_batch_size"):
        config["train"] = {**train, "global_batch_size": _batch_size(_headers(path.parent)[1]["args"])}
    return config


def _batch_size(args: Any) -> int | None:
    """The global batch size in Megatron's args, in packs; an early release of ours says only what it was made of."""
    size = getattr(args, "global_batch_size", None)
    return size or (getattr(args, "micro_batch_size", 0) or 0) * (getattr(args, "data_parallel_size", 0) or 0) or None
