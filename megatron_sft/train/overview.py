"""What a run says before its first step: a row as it is trained, parameters, memory, lengths, and where results go.

Not here: what it says at its end (next_steps.py), figures of the data (data/report.py).
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sft import plan
from megatron_sft.config.groups import parameter_groups
from megatron_sft.config.run import RunConfig
from megatron_sft.data.loader import steps_of_samples
from megatron_sft.data.preview import decoder, sample_text, shown_documents, trained_rows
from megatron_sft.data.sft_dataset import SFTDataset
from megatron_sft.environment import wants_colour
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks
from megatron_sft.train.state import TrainState

GB = 1e9
SOURCES = 6
SHORT = 512
"""Tokens of a row that is shown whole."""


def sample(dataset: SFTDataset, tokenizer: Any) -> str:
    """A row of the first pack, in colour on a terminal."""
    lengths = dataset.store.lengths
    documents = [int(document) for document in dataset.plan[0]]
    chosen = next((document for document in documents if lengths[document] <= SHORT), documents[0])
    ends = {int(token) for token in tokenizer.added_tokens_decoder} | set(tokenizer.all_special_ids)
    return sample_text(dataset.store, chosen, decoder(tokenizer), ends, SHORT, wants_colour(sys.stdout))


def shown_rows(dataset: SFTDataset, tokenizer: Any) -> list[dict[str, Any]]:
    """A row of each of the first sources, for the page of the run."""
    return trained_rows(dataset.store, shown_documents(dataset.store, 1)[:SOURCES], decoder(tokenizer), SHORT)


def memory(expected: plan.Memory, ranks: Ranks) -> str:
    """What the fullest rank is expected to need, beside what there is; a warning where it is too little."""
    parts = ", ".join(f"{name} {_shown(size)}" for name, size in expected.parts_gb.items())
    parts += f"; in host memory {_shown(expected.host_gb)}" if expected.host_gb else ""
    if torch.cuda.is_available():
        there, where = torch.cuda.mem_get_info()[1] / GB, "the GPU"
        needed, parts = expected.total_gb + plan.RESERVED_GB, f"{parts}; {plan.RESERVED_GB:g} more for CUDA and NCCL"
    else:
        there, where, needed = host_bytes() / GB, "this machine", (expected.total_gb + expected.host_gb) * ranks.world_size
    rank = "the fullest rank" if ranks.world_size > 1 else "the one rank"
    line = f"memory: {_shown(expected.total_gb)} GB expected on {rank} ({parts}), {there:.1f} GB on {where}"
    if needed > there:
        logger.warning("%s: it may not fit. Expected room; `megatron-sft plan` with the same flags says which layouts fit.", line)
        return ""
    return line


def kernels(chunks: Sequence[Any], run: RunConfig) -> str:
    """Which kernels attention takes and why, and who computes losses; nothing where there is no choice and none was asked."""
    if not torch.cuda.is_available() and run.train.attention_backend == "auto":
        return ""
    by = "Triton" if chunks[0].config.sft_triton else "torch"
    return f"{chunks[0].config.sft_backend.reason}; loss, RoPE and Adam: {by} (--kernels {run.train.kernels})"


def _shown(gb: float) -> str:
    return f"{gb:.1f}" if gb >= 1 else f"{gb:.3f}"


def host_bytes() -> int:
    """Memory of this machine, or what its control group may use."""
    with open("/proc/meminfo", encoding="ascii") as file:
        total = int(file.readline().split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


def lengths(run: RunConfig, dataset: SFTDataset, state: TrainState, total: int, batch_size: int) -> str:
    """Steps, epochs and tokens of the run."""
    tokens, packs = int(dataset.store.lengths[dataset.plan.doc_ids].sum()), len(dataset.plan)
    steps = steps_of_samples(packs, packs, batch_size)
    begin = f"goes on after step {state.iteration}; " if state.iteration else ""
    return (
        f"length: {begin}{total:,} steps of {batch_size:,} packs; an epoch is {steps:,} steps, {packs:,} packs, {tokens:,} tokens"
    )


def warn_of_muon(run: RunConfig) -> None:
    """What is known of Muon on weights that were trained with another optimizer."""
    if any(group.optimizer == "muon" for group in parameter_groups(run.optim)):
        logger.warning(
            "muon: weights that were pretrained with Adam can get worse with it than with Adam, at every learning rate in "
            "github.com/pytorch/torchtune/issues/2803; on par up to 0.5B in arXiv 2511.06086. Compare with --optimizer adam."
        )


def places(run: RunConfig) -> str:
    """Where results go."""
    checkpoint, texts = run.checkpoint, []
    if checkpoint.save:
        every = f"every {checkpoint.save_interval:,} steps and " if checkpoint.save_interval else ""
        texts.append(f"checkpoints {every}at the end, metrics.jsonl and tensorboard in {checkpoint.save}")
    if checkpoint.save_hf:
        texts.append(f"HF folder {checkpoint.save_hf}")
    if not texts:
        logger.warning("results: none. There is no --save and no --save-hf: nothing of this run is kept.")
        return ""
    return f"results: {'; '.join(texts)}"


def parameters(chunks: Sequence[Any], expected: plan.Memory, run: RunConfig) -> str:
    """How many there are, and how many of them this rank trains where that is not all."""
    own = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in own)
    share = "" if trained == total else f", {trained / total:.2%} of them trained"
    return f"model: {expected.parameters:,} parameters in {run.train.params_dtype}{share}"
