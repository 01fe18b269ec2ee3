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
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_sft.checkpoint import manifest, torch_dist, tracker
from megatron_sft.checkpoint import state as state_dicts
from megatron_sft.config import RunConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks

RUN_CONFIG = "run_config.json"
_SAVE_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, CheckpointingException)


class CheckpointSaver:
    """Writes the checkpoints of one run.

    Args:
        root: folder of the checkpoints, made when missing.
        run: its `checkpoint` says what is kept; all of it is written beside every checkpoint.
        ranks: of this process.
    """

    def __init__(self, root: str | Path, run: RunConfig, ranks: Ranks):
        self.root = Path(root)
        self._run = run
        self._ranks = ranks
        self._threads = max(1, min(4, (os.cpu_count() or 1)))
        self._validated = False
        _agree(self._prepare_root, ranks, f"{self.root}: cannot be used for checkpoints")

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
        """Collective: writes one checkpoint.

        Args:
            iteration: optimizer steps done, or "release".
            chunks: model chunks of this process.
            optimizer: megatron-core's, or None for weights alone.
            scheduler: megatron-core's, or None.
            state: progress of the run: numbers, strings, lists, dicts and tensors; the same on every process.

        Raises:
            CheckpointError: on every process, when it failed on any; earlier checkpoints are untouched.
        """
        folder = tracker.saving_folder(self.root, iteration)
        where = f"{tracker.checkpoint_folder(self.root, iteration)}: not saved"
        try:
            _agree(lambda: self._make(folder), self._ranks, where)
            full = self._state_dict(iteration, chunks, optimizer, scheduler, state)
            job = torch_dist.plan(full, validate=not self._validated)
            self._validated = True
            written = _agree(lambda: torch_dist.write_items(folder, job, self._ranks.rank, self._threads), self._ranks, where)
            _agree(lambda: self._finish(iteration, folder, job, written), self._ranks, where)
        except (CheckpointError, *_SAVE_ERRORS) as error:
            if self._ranks.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{where}: {error}") from error

    def _make(self, folder: Path) -> None:
        if self._ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def _state_dict(
        self, iteration: tracker.Iteration, chunks: list[Any], optimizer: Any, scheduler: Any, state: dict[str, Any]
    ) -> dict[str, Any]:
        number = 0 if iteration == tracker.RELEASE else int(iteration)
        metadata = state_dicts.content_metadata(self._run.parallel.use_distributed_optimizer)
        if not self._run.checkpoint.save_optim:
            optimizer = None
        full = state_dicts.sharded_state(chunks, optimizer, scheduler, metadata, is_loading=False)
        full[state_dicts.RNG_KEY] = state_dicts.rng_state(self._ranks)
        full["args"] = state_dicts.megatron_args(self._run, self._ranks, number, state)
        full["checkpoint_version"] = 3.0
        full["iteration"] = number
        full["num_floating_point_operations_so_far"] = state.get("num_floating_point_operations_so_far", 0)
        full["content_metadata"] = metadata
        full[state_dicts.TRAIN_STATE] = dict(state)
        return full

    def _finish(self, iteration: tracker.Iteration, folder: Path, job: torch_dist.WriteJob, written: list[Any]) -> None:
        """Rank 0 completes the folder and publishes it."""
        if self._ranks.rank != 0:
            return
        records = torch_dist.write_metadata(folder, job, [results for results, _ in written])
        records.append(manifest.write_file(folder / RUN_CONFIG, self._run.to_json().encode()))
        manifest.write_manifest(folder, [*records, *(record for _, files in written for record in files)])
        tracker.sync_folder(folder)
        tracker.publish(self.root, iteration)
        tracker.retain(self.root, self._run.checkpoint.save_retain)


def _agree(action: Any, ranks: Ranks, where: str) -> list[Any]:
    """Collective: runs `action` on every process; its results, by rank.

    Raises:
        CheckpointError: on every process when any of them failed, naming ranks and reasons.
    """
    result, failure = None, None
    try:
        result = action()
    except (CheckpointError, *_SAVE_ERRORS) as error:
        failure = f"{type(error).__name__}: {error}" if not isinstance(error, (OSError, CheckpointError)) else str(error)
    outcomes: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(outcomes, (result, failure))
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
    if failures:
        raise CheckpointError(f"{where}. Found: {'; '.join(failures)}. Free space or mend the folder, then resume.")
    return [result for result, _ in outcomes]


def save_checkpoint(
    root: str | Path,
    iteration: tracker.Iteration,
    chunks: list[Any],
    optimizer: Any | None,
    scheduler: Any | None,
    state: dict[str, Any],
    run: RunConfig,
    ranks: Ranks,
) -> None:
    """Collective: writes one checkpoint. A run that saves more than once keeps a CheckpointSaver instead."""
    CheckpointSaver(root, run, ranks).save(iteration, chunks, optimizer, scheduler, state)


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
    try:
        state = _load(folder, chunks, optimizer if whole else None, scheduler if whole else None, ranks, load_rng and whole)
    except torch_dist.READ_ERRORS as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded: {type(error).__name__}: {error}. Expected a torch_dist checkpoint of this "
            "model and optimizer. Check the model flags, or load the weights alone with --finetune."
        ) from error
    if optimizer is not None and not whole:
        optimizer.reload_model_params()
    if not whole:
        state.update(iteration=0, consumed_train_samples=0)
    logger.info("loaded checkpoint %s at iteration %s", folder, state["iteration"])
    return state


def _choose(root: Path, iteration: tracker.Iteration | None, ranks: Ranks, verify: bool) -> tracker.Iteration:
    """Collective: the first candidate without a problem; all processes check a share of its files."""
    listed: list[Any] = [[iteration] if iteration is not None else tracker.candidates(root)]
    dist.broadcast_object_list(listed, src=0)
    found: list[str] = []
    for candidate in listed[0]:
        folder = tracker.checkpoint_folder(root, candidate)
        outcomes: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(outcomes, manifest.problems(folder, verify, (ranks.rank, ranks.world_size)))
        problems = sorted({text for outcome in outcomes for text in outcome})
        if not problems:
            return candidate
        found += problems[:3]
        if ranks.rank == 0:
            logger.warning("%s is not usable and is skipped: %s", folder, "; ".join(problems[:3]))
    if not listed[0]:
        raise CheckpointError(
            f"{root}: found no {tracker.TRACKER} and no iter_* or release folder. Expected a Megatron checkpoint. "
            "Check the path given to --load."
        )
    raise CheckpointError(f"{root}: no usable checkpoint. Found: {'; '.join(found)}. Restore one from a copy.")


def _load(folder: Path, chunks: list[Any], optimizer: Any, scheduler: Any, ranks: Ranks, load_rng: bool) -> dict[str, Any]:
    metadata = torch_dist.read_metadata(folder)
    common = torch_dist.read_common(folder, metadata)
    args = common.get("args")
    content = common.get("content_metadata") or state_dicts.content_metadata(True)
    if getattr(args, "no_save_optim", False):
        optimizer = None
    wanted = state_dicts.sharded_state(chunks, optimizer, None, content, is_loading=True)
    rng = state_dicts.rng_state(ranks)
    if load_rng and rng.unique_key in torch_dist.sharded_keys(metadata):
        wanted[state_dicts.RNG_KEY] = rng
    elif load_rng and ranks.rank == 0:
        logger.info("%s: random states are of another layout; the seed's are used.", folder)
    loaded = torch_dist.read_state(folder, wanted, metadata, common)
    for index, chunk in enumerate(chunks):
        state_dicts.unwrap(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"], strict=True)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    if scheduler is not None and "opt_param_scheduler" in loaded:
        scheduler.num_steps = 0  # its load_state_dict adds to what is there
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if state_dicts.RNG_KEY in wanted:
        state_dicts.restore_rng(loaded[state_dicts.RNG_KEY])
    state = dict(loaded.get(state_dicts.TRAIN_STATE, {}))
    state["iteration"] = int(loaded.get("iteration", 0))
    state.setdefault("consumed_train_samples", int(getattr(args, "consumed_train_samples", 0)))
    return state


def latest_iteration(root: str | Path) -> tracker.Iteration | None:
    """The checkpoint that load_checkpoint tries first and whose files are all there; None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints and every one is incomplete.
    """
    root = Path(root)
    listed = tracker.candidates(root)
    found: list[str] = []
    for candidate in listed:
        problems = manifest.problems(tracker.checkpoint_folder(root, candidate), content=False)
        if not problems:
            return candidate
        found += problems
    if listed:
        raise CheckpointError(f"{root}: no usable checkpoint. Found: {'; '.join(found[:5])}. Restore one from a copy.")
    return None


def read_run_config(root: str | Path, iteration: tracker.Iteration | None = None) -> dict[str, Any]:
    """The resolved configuration that a checkpoint was written with; {} for a checkpoint of Megatron-LM."""
    root = Path(root)
    chosen = latest_iteration(root) if iteration is None else iteration
    if chosen is None:
        return {}
    path = tracker.checkpoint_folder(root, chosen) / RUN_CONFIG
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}; expected the JSON written with the checkpoint. Delete it or restore it.") from error
