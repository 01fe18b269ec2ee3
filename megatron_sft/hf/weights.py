"""Weights of a Hugging Face folder into a model that is cut over ranks.

Every rank finds its own parameters, looks up which windows of which HF tensors they are (families.py, layout.py), and
copies those windows out of the memory-mapped files, one file after the other.

Not here: the way back (exporter.py), config.json (config.py), file formats (folder.py), Megatron checkpoints (checkpoint/).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_sft.config.run import ModelConfig
from megatron_sft.errors import CheckpointError, TrainingError
from megatron_sft.hf.config import (
    family_of,
    read_hf_config,
)
from megatron_sft.hf.families import WEIGHTLESS, Family
from megatron_sft.hf.folder import (
    INDEX,
    SINGLE,
    StoredTensor,
    one_thread,
    open_file,
    stored_tensors,
)
from megatron_sft.hf.layout import LAYOUTS, REPLICATED, Placement, Shard, read_shard
from megatron_sft.log import logger
from megatron_sft.model.lora import is_adapter
from megatron_sft.parallel import Ranks, agree, gather

TIED = "output_layer.weight"
LAYER_NUMBER = re.compile(r"\w+\.layers\.(\d+)\.")
"""How the names of a layer's HF tensors begin."""
OPEN_BYTES = 2**28
"""Read from one opening of a file."""


class Held(NamedTuple):
    """A shard that this rank holds, under its name over all stages and expert ranks."""

    name: str
    local: torch.Tensor
    placement: Placement
    sources: tuple[str, ...]
    part: tuple[int, int]
    """Which of how many tensor-parallel shards; (0, 1) for a tensor that every rank has."""
    layout: str = ""
    local_name: str = ""
    """In its model chunk."""
    changed: Callable[[], torch.Tensor] | None = None
    """Gives what is written in place of `local`: the weight with its adapter in it."""

    def value(self) -> torch.Tensor:
        """What is written, in the dtype of `local`."""
        return self.local if self.changed is None else self.changed().to(self.local.dtype)


def is_hf_folder(path: str | Path) -> bool:
    """A folder with config.json and safetensors (or pickled weights, which loading then explains)."""
    folder = Path(path)
    weights = (folder / SINGLE).exists() or (folder / INDEX).exists() or any(folder.glob("*.bin"))
    return (folder / "config.json").is_file() and weights


def core_module(chunk: Any) -> Any:
    """The GPTModel inside DDP and precision wrappers."""
    while not hasattr(chunk, "decoder"):
        assert hasattr(chunk, "module"), f"{type(chunk).__name__} is no GPTModel and wraps none"
        chunk = chunk.module
    return chunk


def _global_name(module: Any, name: str, model: ModelConfig, ranks: Ranks) -> tuple[str, str, int, int]:
    """(pattern in families.py, name over all ranks, layer, expert) of a parameter of this chunk."""
    layer = expert = 0
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    pattern = name
    if match:
        layer = module.decoder.layers[int(match[1])].layer_number - 1
        pattern = f"decoder.layers.{{layer}}.{name[match.end() :]}"
    match = re.search(r"\.local_experts\.(\d+)\.", pattern)
    if match:
        expert = ranks.ep_rank * ((model.moe.num_moe_experts or 0) // ranks.ep_size) + int(match[1])
        pattern = pattern.replace(match[0], ".local_experts.{expert}.")
    return pattern, pattern.format(layer=layer, expert=expert), layer, expert


def held_shards(chunks: Sequence[nn.Module], model: ModelConfig, family: Family, ranks: Ranks) -> Iterator[Held]:
    """Every shard of the model that this rank holds, with its place in the HF checkpoint."""
    from megatron.core import parallel_state

    expert_part = (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    for chunk in chunks:
        module = core_module(chunk)
        for local_name, parameter in _weights(module):
            pattern, name, layer, expert = _global_name(module, local_name, model, ranks)
            rule = family.tensors.get(pattern)
            if rule is None:
                raise CheckpointError(
                    f"parameter {name}: {family.architecture} has no tensor for it; expected only "
                    "parameters of families.py. The flags describe a model that this family is not."
                )
            layout, *sources = rule
            if name == TIED and model.share_embeddings_and_output_weights:
                sources = list(family.tensors["embedding.word_embeddings.weight"][1:])
            part = expert_part if "{expert}" in pattern else (ranks.tp_rank, ranks.tp_size)
            shard = Shard(tuple(parameter.shape), part[0], part[1], model, expert)
            placement = LAYOUTS[layout](shard)
            names = tuple(source.format(layer=layer, expert=expert) for source in sources)
            yield Held(name, parameter.detach(), placement, names, (0, 1) if layout in REPLICATED else part, layout, local_name)


def _weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of the model itself, and the one kind of buffer that HF checkpoints hold: the router's expert bias."""
    yield from ((name, parameter) for name, parameter in module.named_parameters() if not is_adapter(name))
    for name, buffer in module.named_buffers():
        if name.endswith("router.expert_bias") and buffer is not None:
            yield name, buffer


def first_not_finite(chunks: Sequence[nn.Module]) -> str | None:
    """Name of the first parameter on this rank with a NaN or an infinity. One sum a tensor, and one wait for the device."""
    modules = [core_module(chunk) for chunk in chunks]
    named = [(name, tensor.detach()) for module in modules for name, tensor in _weights(module)]
    named += [(name, tensor.detach()) for module in modules for name, tensor in module.named_parameters() if is_adapter(name)]
    if not named:
        return None
    sums = torch.stack([tensor.sum(dtype=torch.float32) for _, tensor in named])
    suspects = (~sums.isfinite()).nonzero().flatten().tolist()  # finite values may have an infinite sum
    return next((named[i][0] for i in suspects if not bool(named[i][1].isfinite().all())), None)


def require_finite(chunks: Sequence[nn.Module], ranks: Ranks, target: str) -> None:
    """Collective, before weights are written.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        ranks: of this process.
        target: begins the message: what is not written.

    Raises:
        TrainingError: on every rank, naming a parameter that holds NaN or infinite values on one.
    """

    def check() -> None:
        if name := first_not_finite(chunks):
            raise TrainingError(
                f"{target}: not saved. {name} on rank {ranks.rank} holds NaN or infinite values; expected numbers. Earlier "
                "checkpoints are untouched: lower --lr or mend --clip-grad, and resume."
            )

    agree(check)


def load_hf_weights(chunks: Sequence[nn.Module], model: ModelConfig, folder: str | Path, ranks: Ranks) -> None:
    """Fills the model from an HF folder. Each rank reads only the slices that it needs.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        model: the architecture that the chunks were built from.
        folder: HF folder with config.json and safetensors.
        ranks: this process's place.

    Raises:
        CheckpointError: missing or extra tensors, wrong shapes, damaged files; before anything is copied.
    """
    family, stored, held = agree(lambda: _prepare(chunks, model, folder, ranks))
    _check_names(held, stored, model, family, Path(folder))
    if model.share_embeddings_and_output_weights:
        agree(lambda: _refuse_other_head(stored, family, Path(folder)) if ranks.rank == 0 else None)
    by_file: dict[Path, list[Held]] = {}
    for item in held:
        for file in dict.fromkeys(stored[source].file for source in item.sources):
            by_file.setdefault(file, []).append(item)
    with torch.no_grad(), one_thread():
        for path in sorted(by_file):
            for batch in _batches(by_file[path]):
                _read_batch(path, batch, stored)


def _batches(items: Sequence[Held]) -> Iterator[list[Held]]:
    """Items in groups of about OPEN_BYTES: pages of a mapped file count as this process's memory until it is closed."""
    batch: list[Held] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item.local.nbytes
        if size > OPEN_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _read_batch(path: Path, items: Sequence[Held], stored: Mapping[str, StoredTensor]) -> None:
    with open_file(path) as file:
        for item in items:
            here = {
                number: file.get_tensor(stored[source].name)
                for number, source in enumerate(item.sources)
                if stored[source].file == path
            }
            read_shard(item.placement, item.local, here)


def _prepare(
    chunks: Sequence[nn.Module], model: ModelConfig, folder: str | Path, ranks: Ranks
) -> tuple[Family, dict[str, StoredTensor], list[Held]]:
    family = family_of(read_hf_config(folder))
    return family, stored_tensors(folder), list(held_shards(chunks, model, family, ranks))


def _check_names(
    held: Sequence[Held], stored: Mapping[str, StoredTensor], model: ModelConfig, family: Family, folder: Path
) -> None:
    """Compares names and shapes over all ranks; every rank raises the same error."""
    wanted = {name: shape for item in held for name, shape in zip(item.sources, item.placement.shapes, strict=True)}
    for other in gather(wanted):
        wanted.update(other)
    ignored = set(WEIGHTLESS)
    if model.share_embeddings_and_output_weights:
        ignored.add(family.tensors[TIED][1])
    missing = sorted(wanted.keys() - stored.keys())
    extra = sorted(name for name in stored.keys() - wanted.keys() if not name.endswith(tuple(ignored)))
    predicting = [name for name in extra if predicts(name, stored)]
    if predicting:
        logger.info("left out: %d tensors of multi-token prediction", len(predicting))
        extra = sorted(set(extra) - set(predicting))
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors missing (first: {', '.join(missing[:3])})")
    if extra:
        faults.append(f"{len(extra)} tensors that the model does not have (first: {', '.join(extra[:3])})")
    for name in sorted(wanted.keys() & stored.keys()):
        if stored[name].shape != wanted[name]:
            faults.append(f"{name} has shape {list(stored[name].shape)}, not {list(wanted[name])}")
    if faults:
        shown = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise CheckpointError(
            f"{folder}: {'; '.join(shown)}; expected exactly the tensors that config.json describes. "
            "Check that config.json and the weights belong together, or download the folder again."
        )


def _refuse_other_head(stored: Mapping[str, StoredTensor], family: Family, folder: Path) -> None:
    """Raises CheckpointError where a head is stored beside the embedding that it should be, with other values.

    transformers 5 leaves such a pair untied, transformers 4 ties it: what the folder means is not known.
    """
    head, embedding = stored.get(family.tensors[TIED][1]), stored[family.tensors["embedding.word_embeddings.weight"][1]]
    if head is None:
        return
    rows = max(1, OPEN_BYTES // 16 // max(1, head.shape[1]))
    for start in range(0, head.shape[0], rows):
        parts = []
        for tensor in (head, embedding):
            with open_file(tensor.file) as file:
                parts.append(file.get_slice(tensor.name)[start : start + rows])
        if not torch.equal(*(part.float() for part in parts)):
            raise CheckpointError(
                f"{folder}: {head.name} holds other values than {embedding.name}, though config.json ties them "
                '(tie_word_embeddings); expected the same. Write "tie_word_embeddings": false into config.json to use both, as '
                "transformers 5 does, or take the head out of the weights."
            )


def predicts(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor belongs to multi-token prediction: mtp.*, or DeepSeek's layers behind the last one (eh_proj)."""
    match = LAYER_NUMBER.match(name)
    return name.startswith("mtp.") or (match is not None and f"{match[0]}eh_proj.weight" in stored)
