"""`megatron-sft doctor [CONF] [flags of finetune.py]`: what would go wrong with a run, before it starts. One line a check.

The checks, in this order; one that needs a failed one is left out:
flags, packages, devices, weights, tokenizer, rows, masks, layout, disk, loss.

Nothing is trained or written. Not here: the run's own checks, which are called (problems.py, mask_gate.py, resolve, plan).
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_sft import parallel, plan
from megatron_sft.config.folders import export_folder
from megatron_sft.config.options import DoctorConfig, PlanConfig
from megatron_sft.config.problems import problems
from megatron_sft.config.run import CheckpointConfig, ParallelConfig, RunConfig
from megatron_sft.config.state_bytes import state_bytes
from megatron_sft.data.chat import ChatEncoder, load_tokenizer
from megatron_sft.data.loader import collate
from megatron_sft.data.mask_gate import check_masks
from megatron_sft.data.packing import pack
from megatron_sft.data.schema import Row, RowError, to_row
from megatron_sft.data.sft_dataset import SFTDataset, pad_token_id_of
from megatron_sft.data.sources import open_source
from megatron_sft.data.store import Document, MemoryStore
from megatron_sft.data.tokens import Portion, encode_rows
from megatron_sft.errors import CheckpointError, ConfigError, DataError, UserError
from megatron_sft.hf.target import try_target
from megatron_sft.hf.verify import reference_losses
from megatron_sft.hf.weights import first_not_finite
from megatron_sft.log import logger
from megatron_sft.train.overview import host_bytes
from megatron_sft.train.step import run_schedule
from megatron_sft.weights import WeightSource, build, resolve

GB = 1e9
LOSS_TOKENS = 256
"""Of the shortest of the first rows, which are compared with transformers: several fit, so that one could see another."""
LOSS_TOLERANCE = 1e-3
"""Largest relative difference of a document's loss in fp32."""
PROBE = "Hello, world! 1 + 1 = 2.\nuser: caf\u00e9 \u4f60\u597d <|im_end|>"
"""Text that tokenizers of different models cut differently."""


@dataclass
class Patient:
    """The run, and what the checks before found."""

    run: RunConfig
    explicit: frozenset[str]
    options: DoctorConfig
    source: WeightSource | None = None
    tokenizer: Any = None
    rows: list[tuple[str, Any]] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)


Check = Callable[[Patient], str]
"""What is right, in a few words. Raises UserError with a way out, or _Skipped."""


class _Skipped(Exception):
    """A check that does not apply; says why."""


def examine(read: Callable[[], tuple[RunConfig, frozenset[str], DoctorConfig]]) -> int:
    """Prints one line a check.

    Args:
        read: gives the run, the fields that flags set, and the options; raises ConfigError.

    Returns:
        1 if anything failed, else 0.
    """
    start, level = time.monotonic(), logger.level
    logger.setLevel(logging.ERROR)  # what the run itself would say of these settings
    try:
        wrong = _examine(read)
    finally:
        logger.setLevel(level)
    print(f"{f'{wrong} checks failed or were left out' if wrong else 'nothing found'} in {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


def _examine(read: Callable[[], tuple[RunConfig, frozenset[str], DoctorConfig]]) -> int:
    """Checks that failed, or that could not be made for one that failed."""
    failed: set[str] = set()
    try:
        patient = Patient(*read())
        _say("ok", "flags", f"{len(patient.explicit)} settings, no contradiction")
    except ConfigError as error:
        for problem in error.problems:
            _say("FAIL", "flags", problem)
        failed, patient = {"flags"}, Patient(RunConfig(), frozenset(), DoctorConfig())
    for name, (check, needed) in CHECKS.items():
        if missing := [other for other in needed if other in failed]:
            failed.add(name)
            _say("-", name, f"not checked: mend {missing[0]} first")
            continue
        try:
            _say("ok", name, check(patient))
        except _Skipped as reason:
            _say("-", name, str(reason))
        except UserError as error:
            failed.add(name)
            for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
                _say("FAIL", name, problem)
    return len(failed)


def _say(outcome: str, name: str, text: str) -> None:
    print(f"{outcome:4} {name:9} {' '.join(text.split())}", flush=True)


def packages(patient: Patient) -> str:
    """Versions within the ranges of setup.py; where the package is not installed, those that there are."""
    try:
        wanted = [Requirement(text) for text in metadata.requires("megatron-sft") or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        wanted = [Requirement(name) for name in ("torch", "megatron-core", "transformers")]
    wrong, versions = [], []
    for requirement in wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed; expected it. pip install '{requirement}'.")
            continue
        versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(Version(version).base_version):
            wrong.append(f"{requirement.name} is {version}; expected {requirement.specifier}. pip install '{requirement}'.")
    if wrong:
        raise ConfigError(wrong)
    return ", ".join(versions[:3]) + (f" and {len(versions) - 3} more" if len(versions) > 3 else "")


def devices(patient: Patient) -> str:
    """GPUs that bf16 and NCCL work on, as many as this machine's processes; or a CPU."""
    if not torch.cuda.is_available():
        if os.path.exists("/dev/nvidiactl"):
            raise ConfigError(
                [
                    f"this machine has an NVIDIA GPU that torch {torch.__version__} does not see; expected a CUDA build and a "
                    "driver of its version. Compare nvidia-smi with torch.version.cuda, and look at CUDA_VISIBLE_DEVICES."
                ]
            )
        return f"no GPU: CPU and gloo, {os.cpu_count()} cores"
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(number) for number in range(count)})
    if patient.run.train.params_dtype == "bf16" and torch.cuda.get_device_capability()[0] < 8:
        raise ConfigError([f"{names[0]} has no bf16; expected an Ampere GPU or a later one. Use --fp32 in place of --bf16."])
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    more = f"; {patient.options.processes} processes need other machines too" if patient.options.processes > count else ""
    return f"{count} x {', '.join(names)}, CUDA {torch.version.cuda}, NCCL {nccl}{more}"


def weights(patient: Patient) -> str:
    """The weights are there and whole by their headers, and flags and config.json agree."""
    whole = dataclasses.replace(patient.run, parallel=ParallelConfig())
    run, patient.source = resolve(whole, patient.explicit)
    patient.run = dataclasses.replace(patient.run, model=run.model)
    kind = "HF folder" if patient.source.is_hf else "goes on from" if patient.source.resumes else "weights of"
    return f"{kind} {patient.source.path}, {_parameters(run) / GB:.2f} B parameters"


def _parameters(run: RunConfig) -> int:
    """Of the whole model."""
    (counts,) = plan.rank_parameters(dataclasses.replace(run, parallel=ParallelConfig()), 1)
    return sum(counts)


def tokenizer(patient: Patient) -> str:
    """It loads, has a chat template, and is the one that the weights were trained with."""
    config = patient.run.data
    patient.tokenizer = load_tokenizer(config)
    ChatEncoder(patient.tokenizer, config)
    load = patient.source.path if patient.source and patient.source.is_hf else None
    if load and os.path.realpath(load) != os.path.realpath(config.tokenizer_model) and _has_tokenizer(load):
        theirs = load_tokenizer(dataclasses.replace(config, tokenizer_model=load, chat_template=None))
        if theirs.encode(PROBE) != patient.tokenizer.encode(PROBE):
            raise ConfigError(
                [
                    f"--tokenizer-model {config.tokenizer_model} makes other tokens than the tokenizer of {load}; expected the "
                    "one that the weights were trained with. Leave --tokenizer-model (TOKENIZER_MODEL) out."
                ]
            )
    template = "--chat-template" if config.chat_template else "its own template"
    return f"{config.tokenizer_model}, {len(patient.tokenizer):,} tokens, {template}"


def _has_tokenizer(folder: str) -> bool:
    return any(Path(folder, name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def rows(patient: Patient) -> str:
    """The first rows of each source can be read, fit in a pack, and have something to train."""
    config, limit = patient.run.data, patient.options.doctor_rows
    if not config.train_data:
        raise DataError("no data are named; expected rows to train on. Pass --finetune-hf-dataset or set DATASET.")
    for path in config.train_data:
        patient.rows += itertools.islice(open_source(path, config), limit)
    encoder = ChatEncoder(patient.tokenizer, config)
    encoded = encode_rows(encoder, config, Portion(0, patient.rows))
    ends = encoded.lengths.cumsum()
    bounds = zip(ends - encoded.lengths, ends, strict=True)
    patient.documents = [Document(encoded.tokens[a:b], encoded.loss_mask[a:b]) for a, b in bounds]
    problems, count = [], len(patient.rows)
    if len(encoded.problems) > config.max_bad_rows:
        first = "; ".join(problem.message for problem in encoded.problems[:3])
        problems.append(f"{len(encoded.problems)} of the first {count} rows are bad. {first} Or set them aside: --max-bad-rows.")
    for reason, way_out in DROPPED.items():
        if dropped := encoded.counts.get(f"dropped:{reason}"):
            problems.append(f"{dropped} of the first {count} rows: {reason}; expected something to train. {way_out}")
    if (cut := encoded.counts.get("truncated", 0)) and "truncation" not in patient.explicit:
        problems.append(
            f"{cut} of the first {count} rows are longer than --seq-length {config.seq_length} and lose the ends of their "
            "answers. Raise --seq-length, or choose what happens to them: --truncation split, drop or right."
        )
    if not patient.documents and not problems:
        problems.append(f"none of the first {count} rows is left to train on. Look at them: megatron-sft preview.")
    if patient.source and encoded.tokens.max(initial=0) >= patient.run.model.vocab_size:
        problems.append(
            f"token id {encoded.tokens.max()}, but the model's vocabulary ends at {patient.run.model.vocab_size - 1}. Expected "
            "the model's own tokenizer: pass its folder as --tokenizer-model."
        )
    if problems:
        raise ConfigError(problems)
    trained = (encoded.loss_mask > 0).mean()
    return f"{count} read, {len(patient.documents)} documents, {len(encoded.tokens):,} tokens, {trained:.0%} of them trained"


DROPPED = {
    "no trained token": "Check the roles (--role-map) and --train-on, and that answers begin before --seq-length.",
    "too long": "Raise --seq-length, or use --truncation split.",
}


def masks(patient: Patient) -> str:
    """Whose tokens are trained is decided exactly, and the end of each turn is trained."""
    config = patient.run.data
    good: list[Row] = []
    for where, record in patient.rows:
        with contextlib.suppress(RowError):
            good.append(to_row(record, where, config))
    routes = check_masks(ChatEncoder(patient.tokenizer, config), good)
    document = patient.documents[0]
    end = patient.tokenizer.decode(document.tokens[document.loss_mask > 0][-2:].tolist())
    return f"decided by {', '.join(routes) or 'the whole text'}; a trained turn ends with {end!r}"


def layout(patient: Patient) -> str:
    """The fullest rank fits in its memory, as `megatron-sft plan` counts it."""
    count, cuda = patient.options.processes, torch.cuda.is_available()
    available = torch.cuda.mem_get_info()[1] if cuda else host_bytes() / count
    memory = patient.options.gpu_memory or available / GB
    size = patient.run.parallel.tensor_model_parallel_size
    run = dataclasses.replace(patient.run, model=plan.padded(patient.run.model, size))
    if wrong := problems(run, count):  # of the architecture that the flags left open
        raise ConfigError(wrong)
    row = plan.row_of(run, PlanConfig(gpus=count, gpu_memory=memory), patient.run.data.tokenizer_model, ())
    sizes = " ".join(f"{name}={value}" for name, value in row.sizes.items() if value > 1) or "one process"
    if not row.fits:
        raise ConfigError(
            [
                f"{sizes}: the fullest rank needs about {row.total_gb:.1f} GB, and has {memory:.1f} GB. megatron-sft plan CONF "
                f"--gpus {count} says which layouts fit; --recompute-granularity full and bf16 moments need less."
            ]
        )
    return f"{sizes}: about {row.total_gb:.1f} of {memory:.1f} GB on the fullest rank"


def disk(patient: Patient) -> str:
    """Checkpoints, HF folder and token store can be written, and there is room for what is kept."""
    run, problems, said = patient.run, list[str](), list[str]()
    parameters = _parameters(run)
    size = state_bytes(run)
    one = parameters * (size.weights + (size.states + size.host if run.checkpoint.save_optim else 0))
    kept = (run.checkpoint.save_retain or 1) + 1  # the old one stays until the new one is whole
    places = {"--save": (run.checkpoint.save, one * kept), "--data-cache-path": (run.data.data_cache_path, _data_bytes(run))}
    for flag, (place, needed) in places.items():
        if place:
            free = _free_bytes(flag, place, problems)
            said.append(f"{place}: {free / GB:.1f} GB free, {needed / GB:.1f} needed")
            if 0 <= free < needed:
                problems.append(
                    f"{flag} {place}: {free / GB:.1f} GB free; expected {needed / GB:.1f} GB ({kept} checkpoints of "
                    f"{one / GB:.1f} GB). Free room, name another folder, or use --no-save-optim."
                    if flag == "--save"
                    else f"{flag} {place}: {free / GB:.1f} GB free; expected {needed / GB:.1f} GB of tokens. Name another folder."
                )
    if run.checkpoint.save_hf:
        try_target(Path(export_folder(run.checkpoint.save_hf, 0)), None, parameters * 2)
    if problems:
        raise ConfigError(problems)
    return "; ".join(said) or "nothing is saved: no --save"


def _data_bytes(run: RunConfig) -> int:
    return sum(os.path.getsize(path) for path in run.data.train_data if os.path.isfile(path))


def _free_bytes(flag: str, place: str, problems: list[str]) -> int:
    """Of the disk that a folder is or will be on; -1 with a sentence in `found` where it cannot be written."""
    parent = os.path.abspath(place)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".doctor-", dir=parent))
        return shutil.disk_usage(parent).free
    except OSError as error:
        problems.append(f"{flag} {place}: {parent} cannot be written ({error.strerror}). Name a folder that can: {flag} FOLDER.")
        return -1


def loss(patient: Patient) -> str:
    """One forward pass of the packed path against transformers, a row at a time, in fp32."""
    source, run = patient.source, patient.run
    if source is None or not source.is_hf:
        raise _Skipped("not compared: there is no HF folder to compare with")
    needed, free = 4.0 * _parameters(run), psutil.virtual_memory().available
    if needed > 0.7 * free or needed > 10 * GB:
        raise _Skipped(f"not compared: {needed / GB:.0f} GB in fp32, with {free / GB:.0f} GB free; training compares layers")
    documents = list(_shortest(patient.documents))
    store = MemoryStore(documents)
    plan_ = pack(store.lengths, max(run.data.seq_length, int(store.lengths.sum())), "sequential")
    dataset = SFTDataset(store, plan_, run.data.seq_length, pad_token_id_of(patient.tokenizer))
    alone = dataclasses.replace(
        run,
        parallel=ParallelConfig(),
        train=dataclasses.replace(run.train, params_dtype="fp32"),
        checkpoint=CheckpointConfig(load=source.path, verify_conversion=False),
    )
    ranks = parallel.initialize(alone.parallel, 0)
    try:
        chunks = build(alone, source, ranks)
        if name := first_not_finite(chunks):
            raise CheckpointError(
                f"{source.path}: {name} holds NaN or infinite values; expected numbers. Download the folder again, or take an "
                "earlier checkpoint."
            )
        with torch.no_grad():
            (report,) = run_schedule([chunk.eval() for chunk in chunks], [collate(dataset, range(len(plan_)))], forward_only=True)
        ours = [float(total / count) for total, count, _ in report["documents"].tolist() if count]
        del chunks
        theirs = reference_losses(Path(source.path), [(d.tokens, d.loss_mask) for d in documents])
    finally:
        parallel.finalize()
    worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, theirs, strict=True))
    if not worst <= LOSS_TOLERANCE:
        raise CheckpointError(
            f"{source.path}: the loss of our packed path is {ours}, transformers' {theirs}; expected the same. Run megatron-sft "
            "verify on the folder, and report it."
        )
    mean, chance = sum(ours) / len(ours), math.log(run.model.vocab_size)
    return f"{len(ours)} rows: {mean:.4f} a token (chance: {chance:.1f}), {worst:.0e} from transformers"


def _shortest(documents: Sequence[Document]) -> Iterator[Document]:
    """Beginnings of the shortest documents that have a trained token, LOSS_TOKENS together."""
    left = LOSS_TOKENS
    for document in sorted(documents, key=lambda document: len(document.tokens)):
        tokens, mask = document.tokens[:left], document.loss_mask[:left]
        if mask[1:].any() and left > 1:
            yield Document(tokens, (mask > 0).astype("uint8"))
            left -= len(tokens)


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "packages": (packages, ()),
    "devices": (devices, ()),
    "weights": (weights, ("flags",)),
    "tokenizer": (tokenizer, ("flags",)),
    "rows": (rows, ("flags", "tokenizer")),
    "masks": (masks, ("rows",)),
    "layout": (layout, ("weights",)),
    "disk": (disk, ("weights",)),
    "loss": (loss, ("weights", "rows", "masks")),
}
"""Name -> (check, the checks that must have passed)."""
