"""From a RunConfig to a Job that can be trained: architecture, data, model, weights, optimizer, in this order.

Cheap checks come first: every contradiction in the configuration is found before a row is read, and every bad row
before a weight is.
"""

import dataclasses
import gc
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_sft import parallel
from megatron_sft.checkpoint.lock import Lock, held
from megatron_sft.checkpoint.resume import kept_batch_size, refuse_changed
from megatron_sft.config.folders import export_folders, written_place
from megatron_sft.config.run import BASE_IDENTITY, DATA_IDENTITY, RunConfig
from megatron_sft.core_compat import use_deterministic_algorithms
from megatron_sft.data.chat import load_tokenizer
from megatron_sft.data.loader import TrainLoader, ValidLoader, order_digest, pack_alignment, steps_of_samples
from megatron_sft.data.prepare import VALID_SPLITS, mixture, open_store, pack_documents, split_documents
from megatron_sft.data.report import as_table, data_report
from megatron_sft.data.sft_dataset import SFTDataset, pad_token_id_of
from megatron_sft.data.tokens import TokenStore
from megatron_sft.environment import started
from megatron_sft.errors import CheckpointError, DataError, TrainingError
from megatron_sft.hf.exporter import try_places
from megatron_sft.hf.target import lock_folder
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks, agree, gather
from megatron_sft.plan import Memory, expected_memory
from megatron_sft.train import memory, overview
from megatron_sft.train.benchmarks import Benchmarks, read_benchmarks
from megatron_sft.train.evaluate import evaluate, valid_bytes
from megatron_sft.train.loop import Job, schedule_position, train, valid_metrics
from megatron_sft.train.next_steps import next_steps, started_by
from megatron_sft.train.optim import build_optimizer, build_scheduler, schedule_lengths, whole_parameters, wrap_ddp
from megatron_sft.train.recorded import facts, recorded
from megatron_sft.train.saving import Saving
from megatron_sft.train.state import TrainState
from megatron_sft.train.watch import Watch
from megatron_sft.weights import WeightSource, build, find_source, resolve, restore

EXIT_DURATION = 4


@dataclass(frozen=True)
class Data:
    """The packed rows of a run."""

    store: TokenStore
    train: SFTDataset
    valid: SFTDataset | None
    tokenizer: Any
    report: Mapping[str, Any]
    benchmarks: Benchmarks | None = None


def finetune(run: RunConfig, explicit: frozenset[str]) -> int:
    """Runs one training from flags to the last checkpoint, on every rank.

    Args:
        run: resolved flags; its model holds what flags alone say.
        explicit: fields of run.model that a flag set.

    Returns:
        The process's exit status: 0 at the end of training, 128 + n after signal n, 4 after --exit-duration-in-mins or
        --exit-interval.

    Raises:
        UserError: anything that the user can mend; the message says what.
    """
    run, source = resolved(run, explicit)
    if run.train.deterministic_mode:
        use_deterministic_algorithms()
    expected = expected_memory(run, parallel.process_environment()[1]) if parallel.process_environment()[0] == 0 else None
    ranks = parallel.initialize(run.parallel, run.train.seed)
    with Watch(ranks, run.parallel.stall_timeout_s) as watch, memory.explained(run, ranks):
        watch.tell("taking the lock of the --save folder")
        with held(run.checkpoint.save, ranks, watch.before_end) as lock:
            agree(lambda: _require_unchanged(source, run))
            with _held_export(run, ranks, watch):
                status = _finetune(run, ranks, source, watch, lock, expected)
    parallel.finalize()
    return status


def _require_unchanged(source: WeightSource, run: RunConfig) -> None:
    """Another run may have ended between the first look and the lock."""
    if find_source(run) != source:
        raise CheckpointError(
            f"{run.checkpoint.save}: another run wrote to it while this one began. Expected nobody else there. Give the same "
            "command again: it goes on from what is there now."
        )


@contextmanager
def _held_export(run: RunConfig, ranks: Ranks, watch: Watch) -> Iterator[None]:
    """Collective: the --save-hf folder is this run's from now on, not only when it is written, at the end."""
    save_hf = run.checkpoint.save_hf
    if not save_hf:
        yield
        return
    try_places(export_folders(save_hf), ranks, run.data.tokenizer_model)
    with held(lock_folder(written_place(save_hf)), ranks, watch.before_end, "--save-hf", save_hf):
        yield


def _finetune(run: RunConfig, ranks: Ranks, source: WeightSource, watch: Watch, lock: Lock, expected: Memory | None) -> int:
    watch.tell("reading the data")
    data = build_data(run)
    watch.tell("building the model")
    job, state, saving = build_job(run, ranks, source, data, watch, lock)
    if run.train.skip_train:
        validate_only(job, state.iteration)
        return 0
    if state.iteration >= len(job.loader):
        raise TrainingError(
            f"{source.path}: trained to iteration {state.iteration} already, {state.consumed_samples} samples; expected fewer "
            f"than {job.loader.num_samples}. Ask for more (--num-epoch, --train-iters), or choose another --save for a new run."
        )
    if state.is_stale(run.train.early_stop_patience):
        raise TrainingError(
            f"{source.path}: ended at iteration {state.iteration} already, {state.stale_evaluations} evaluations after the best; "
            "expected fewer than --early-stop-patience. Ask for more, or leave it out, to go on from there."
        )
    if ranks.rank == 0:
        _introduce(job, data, state, expected)
    watch.tell("training")
    gc.freeze()  # full collections, which stop the launches of a step, leave out what the set-up made
    save = run.checkpoint.save
    with recorded(save, ranks.rank, _start(job, data, state) if ranks.rank == 0 and save else {}) as end:
        state, stopped = train(job, state)
        saving.finish()
        if not stopped:
            with whole_parameters(job.chunks, run.parallel):
                saving.export(state.iteration)
        status = 0 if not stopped else 128 + stopped if stopped > 0 else EXIT_DURATION
        end |= {"status": status, "iteration": state.iteration}
    if ranks.rank == 0:
        logger.info("%s", next_steps(run, state, len(job.loader), bool(stopped)))
    return status


def _start(job: Job, data: Data, state: TrainState) -> dict[str, Any]:
    """What attempts.jsonl says of the start."""
    progress = {"iteration": state.iteration, "last_iteration": len(job.loader), "epoch_packs": len(data.train)}
    rows = overview.shown_rows(data.train, data.tokenizer)
    return {**facts(job.run, job.ranks, started_by(started())), **progress, "data": data.report, "rows": rows}


def _introduce(job: Job, data: Data, state: TrainState, expected: Memory | None) -> None:
    """Says what the run is about to do."""
    overview.warn_of_muon(job.run)
    lines = [overview.sample(data.train, data.tokenizer)]
    if expected is not None:
        lines += [overview.parameters(job.chunks, expected, job.run), overview.memory(expected, job.ranks)]
    lines += [overview.lengths(job.run, data.train, state, len(job.loader), job.loader.global_batch_size)]
    lines += [overview.places(job.run), overview.kernels(job.chunks, job.run)]
    for line in filter(None, lines):
        logger.info("%s", line)


def resolved(run: RunConfig, explicit: frozenset[str]) -> tuple[RunConfig, WeightSource]:
    """The run with what its flags leave open, the architecture and the batch size, and where its weights are."""
    run, source = resolve(run, explicit)
    dp_size = parallel.process_environment()[1] // run.parallel.model_parallel_size
    batch_size = kept_batch_size(source.run_config if source.resumes else {}, run.train, dp_size)
    return dataclasses.replace(run, train=dataclasses.replace(run.train, global_batch_size=batch_size)), source


def build_data(run: RunConfig) -> Data:
    """Tokens, masks and packs of the training and the held-out rows."""
    config = run.data
    tokenizer = load_tokenizer(config)
    pad = pad_token_id_of(tokenizer)
    store = open_store(config, config.train_data, config.train_names)
    parts = split_documents(config, store)
    plan = pack_documents(config, store, mixture(config, store, parts.train))
    train_set = SFTDataset.from_config(store, plan, config, pad)
    valid_store = open_store(config, config.valid_data, splits=VALID_SPLITS) if config.valid_data else store
    chosen = np.arange(len(valid_store)) if config.valid_data else parts.valid
    valid_set = None
    if len(chosen) and run.train.eval_iters:
        valid_set = SFTDataset.from_config(valid_store, pack_documents(config, valid_store, chosen), config, pad)
    if run.train.eval_iters and valid_set is None and run.train.skip_train:
        raise DataError("--skip-train: there are no held-out rows; expected some. Pass --valid-data or --split 90,10,0.")
    for opened in (store, valid_store):
        _require_known_tokens(run, opened)
        _require_same_on_all(opened)
    _require_source(run.checkpoint.best_metric, valid_set)
    report = data_report(store, train_set.plan, config.seq_length)
    logger.info("%s", as_table(report))
    return Data(store, train_set, valid_set, tokenizer, report, read_benchmarks(run, tokenizer))


def _require_source(metric: str, valid: SFTDataset | None) -> None:
    """Raises DataError where --best-metric names a source that the held-out rows do not have, or have alone."""
    _, _, source = metric.removeprefix("valid/").partition("/")
    names = valid.store.source_names if valid else ()
    if metric.startswith("valid/") and source and (len(names) < 2 or source not in names):
        raise DataError(
            f"--best-metric {metric}: the held-out rows are of {', '.join(names) or 'no source'}; expected one of several. "
            "Name one, or leave its name out."
        )


def _require_same_on_all(store: TokenStore) -> None:
    """Collective: machines that do not share their files may have other rows, or another tokenizer, in their place."""
    everyone = gather((socket.gethostname(), store.content))
    others = [f"rank {rank} on {host}" for rank, (host, content) in enumerate(everyone) if content != everyone[0][1]]
    if others:
        raise DataError(
            f"{store.folder}: rank 0 on {everyone[0][0]} has other tokens than {', '.join(others[:8])}. Expected the same rows, "
            "tokenizer and template on all machines. Put them on a file system that all share, or copy them again."
        )


def _require_known_tokens(run: RunConfig, store: TokenStore) -> None:
    if store.max_token_id >= run.model.vocab_size:
        raise DataError(
            f"{run.data.tokenizer_model}: the rows have token id {store.max_token_id}, but the model's vocabulary ends at "
            f"{run.model.vocab_size - 1}. Expected the model's own tokenizer: pass its folder as --tokenizer-model."
        )


def build_job(
    run: RunConfig, ranks: Ranks, source: WeightSource, data: Data, watch: Watch, lock: Lock | None = None
) -> tuple[Job, TrainState, Saving]:
    """Model, weights, optimizer and loaders. The state is that of the checkpoint, or a new one."""
    packs = order_digest(data.train.plan, run.data.seed, run.data.shuffle)
    identity = dict(zip(DATA_IDENTITY, (data.store.content, packs), strict=True))
    if source.resumes:
        refuse_changed(source.run_config, run, run.checkpoint.allow_changed, identity)
    chunks = build(run, source, ranks)
    if run.lora.lora_rank:
        identity[BASE_IDENTITY] = chunks[0].base_weights
    wrapped = wrap_ddp(chunks, run.parallel, run.optim.main_grads_dtype)
    optimizer = build_optimizer(wrapped, run)
    restored = restore(run, source, ranks, wrapped, optimizer)
    state = _state_of(restored, source)
    loader, valid_loader = _loaders(run, ranks, data, state)
    total = run.train.train_iters or steps_of_samples(loader.num_samples, loader.num_packs, loader.global_batch_size)
    lengths = schedule_lengths(run, total, loader.num_samples)
    scheduler = build_scheduler(optimizer, run.optim, lengths, schedule_position(lengths, loader, state))
    went_on_from = state.iteration if source.resumes and source.path == run.checkpoint.save else None
    saving = Saving(run, ranks, wrapped, optimizer, scheduler, identity, watch, lock, went_on_from)
    if run.checkpoint.best_metric in restored:  # the kill may have come between a save and its mark
        saving.mark(state.iteration, restored[run.checkpoint.best_metric])
    job = Job(
        run,
        ranks,
        wrapped,
        optimizer,
        scheduler,
        lengths,
        loader,
        valid_loader,
        data.store.source_names,
        data.store.where,
        saving.checkpoint,
        data.benchmarks,
        valid_bytes(valid_loader, data.tokenizer, ranks) if valid_loader else None,
    )
    return job, state, saving


def _loaders(run: RunConfig, ranks: Ranks, data: Data, state: TrainState) -> tuple[TrainLoader, ValidLoader | None]:
    layout = run.parallel
    along_sequence = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    precision = run.train.params_dtype if torch.cuda.is_available() else "fp32"
    dealt: dict[str, Any] = dict(
        dp_rank=ranks.dp_rank,
        dp_size=ranks.dp_size,
        multiple=pack_alignment(precision, along_sequence, layout.context_parallel_size),
        prefetch=run.data.prefetch,
        pin_memory=torch.cuda.is_available(),
    )
    loader = TrainLoader(
        data.train,
        run.train,
        seed=run.data.seed,
        shuffle=run.data.shuffle,
        consumed_samples=state.consumed_samples,
        iteration=state.iteration,
        order_batch_size=state.order_batch_size,
        **dealt,
    )
    return loader, ValidLoader(data.valid, run.train, **dealt) if data.valid else None


def _state_of(restored: dict[str, Any], source: WeightSource) -> TrainState:
    """The state that a checkpoint holds, or what one of Megatron-LM says of it."""
    if "tokens_seen" in restored:  # an early release changed no batch size: its configuration says what the order was made for
        return TrainState.from_dict({"order_batch_size": source.run_config["train"]["global_batch_size"], **restored})
    return TrainState(iteration=restored.get("iteration", 0), consumed_samples=restored.get("consumed_train_samples", 0))


def validate_only(job: Job, iteration: int) -> None:
    """--skip-train: prints the loss of the held-out rows, and asks what --eval-tasks and --sample-prompts ask."""
    assert job.valid_loader is not None, "build_data refuses --skip-train without held-out rows"
    totals = evaluate(job.chunks, job.valid_loader)
    metrics = dict(valid_metrics(job, totals))
    logger.info("validation loss: %.6f | trained tokens: %d | %s", totals.loss, totals.trained_tokens, metrics)
    if job.benchmarks:
        job.benchmarks.answer(job.chunks, job.ranks, iteration)
