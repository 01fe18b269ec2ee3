"""A Hugging Face folder from a model that is cut over ranks.

The ranks agree on who holds which shard, then rank 0 receives them tensor by tensor and writes each HF tensor at its place,
so that nobody ever holds more than its own shards and a few tensors.

Not here: reading (weights.py), what may be replaced (target.py), file formats (folder.py).
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from megatron_sft.config.run import ModelConfig
from megatron_sft.core_compat import device
from megatron_sft.errors import CheckpointError
from megatron_sft.hf.adapters import with_adapters
from megatron_sft.hf.config import family_of, hf_config_from_model, model_config_from_hf, read_hf_config, same_architecture
from megatron_sft.hf.families import Family
from megatron_sft.hf.folder import INDEX, StoredTensor, TensorWriter, one_thread, stored_tensors
from megatron_sft.hf.layout import Placement, whole_sources, write_shard
from megatron_sft.hf.target import new_folder, try_target
from megatron_sft.hf.weights import TIED, Held, held_shards, is_hf_folder
from megatron_sft.parallel import Ranks, agree, gather


class _Offer(NamedTuple):
    """What a rank says about a shard it holds."""

    name: str
    part: tuple[int, int]
    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: Placement
    sources: tuple[str, ...]


Plan = Sequence[tuple[int, _Offer]]
"""(holder, shard) in the order in which rank 0 receives."""
Shards = Mapping[tuple[str, tuple[int, int]], Held]
"""What a rank holds, by name and part."""
Announced = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by HF name."""


class _Export(NamedTuple):
    """What is known of a new HF folder before its tensors' values."""

    config: dict[str, Any]
    """config.json."""
    plan: Plan
    held: Shards
    announced: Announced
    copies: Mapping[str, str]
    """{tensor: another name under which it is stored too}."""


def save_hf(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    folder: str | Path,
    ranks: Ranks,
    source_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes an HF folder that transformers loads as it is. All ranks call it; rank 0 writes.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        model: the architecture that the chunks were built from.
        folder: new folder; an HF folder there is replaced when the new one is complete.
        ranks: this process's place.
        source_folder: HF folder whose config, tokenizer, chat template and dtypes the result takes over; of a folder
            (or hub name) of a tokenizer alone only that. None: config.json is written afresh, without tokenizer.
        dtype: of the stored tensors; None: the source's, without a source the parameters' own.

    Raises:
        SavingError: on every rank when the folder cannot be written; what was there is untouched.
        CheckpointError: there is no HF tensor for a parameter.
    """
    export = _prepared(chunks, model, ranks, source_folder, dtype)

    def begin(temporary: Path) -> TensorWriter:
        (temporary / "config.json").write_text(json.dumps(export.config, indent=2) + "\n", encoding="utf-8")
        return TensorWriter(temporary, export.announced)

    if ranks.rank != 0:
        _send(export.plan, export.held, ranks)
    agree(lambda: _write(Path(folder), export, source_folder, begin) if ranks.rank == 0 else None)


def write_tensors(
    folder: Path,
    held: Shards,
    ranks: Ranks,
    source_folder: str | Path | None,
    begin: Callable[[Path, Announced], TensorWriter],
) -> None:
    """Writes a new folder from shards that every rank holds, in their own dtypes. All ranks call it; rank 0 writes.

    Args:
        folder: new folder; an HF folder there is replaced when the new one is complete.
        held: this rank's shards.
        ranks: this process's place.
        source_folder: whose tokenizer and other companions the folder gets; None: none.
        begin: writes what stands beside the tensors into a folder, and makes the writer of these.

    Raises:
        SavingError: on every rank when the folder cannot be written; what was there is untouched.
    """
    plan = _plan(gather(_offers(held)))
    export = _Export({}, plan, held, _announced(plan, {}, None), {})
    if ranks.rank != 0:
        _send(plan, held, ranks)
    agree(lambda: _write(folder, export, source_folder, lambda new: begin(new, export.announced)) if ranks.rank == 0 else None)


def try_places(folders: Sequence[str], ranks: Ranks, source_folder: str | Path | None = None) -> None:
    """try_hf without a model, which cannot look at the room: before anything is read. All ranks call it.

    Args:
        folders: that may be written.
        ranks: this process's place.
        source_folder: HF folder.

    Raises:
        CheckpointError: on every rank when something stands in the way, or a place cannot be written.
    """

    def try_all() -> None:
        for folder in folders if ranks.rank == 0 else ():
            try_target(Path(folder), _folder(source_folder), 0)

    agree(try_all)


def try_hf(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    folder: str | Path,
    ranks: Ranks,
    source_folder: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Whether save_hf can write there later: what stands in the way, and room. All ranks call it; nothing is written.

    Args:
        chunks: as save_hf's, and so are the others; values are not looked at.
        model: architecture.
        folder: new folder.
        ranks: this process's place.
        source_folder: HF folder.
        dtype: of the stored tensors.

    Raises:
        CheckpointError: on every rank when it cannot.
    """
    export = _prepared(chunks, model, ranks, source_folder, dtype)
    num_bytes = sum(math.prod(shape) * kind.itemsize for shape, kind in export.announced.values())
    agree(lambda: try_target(Path(folder), _folder(source_folder), num_bytes) if ranks.rank == 0 else None)


def exported_tensors(
    chunks: Sequence[nn.Module], model: ModelConfig, folder: str | Path, ranks: Ranks
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that save_hf would write, one at a time, on rank 0. All ranks call it and exhaust it.

    Yields:
        (HF name, whole tensor on the CPU in the dtype that the folder has).
    """
    stored = stored_tensors(folder)
    held, everyone = _offered(chunks, model, family_of(read_hf_config(folder)), ranks)
    plan = _plan(everyone)
    if ranks.rank != 0:
        _send(plan, held, ranks)
        return
    yield from _assembled(_shards(plan, held), plan, _announced(plan, stored, None))


def _offered(chunks: Sequence[nn.Module], model: ModelConfig, family: Family, ranks: Ranks) -> tuple[Shards, list[list[_Offer]]]:
    """This rank's shards, and what every rank offers."""
    shards = agree(lambda: [(chunk, list(held_shards([chunk], model, family, ranks))) for chunk in chunks])
    held = {
        (item.name, item.part): item
        for chunk, shard in shards
        for item in with_adapters(chunk, shard)
        if not (item.name == TIED and model.share_embeddings_and_output_weights)
    }
    return held, gather(_offers(held))


def _offers(held: Shards) -> list[_Offer]:
    return [
        _Offer(item.name, item.part, tuple(item.local.shape), item.local.dtype, item.placement, item.sources)
        for item in held.values()
    ]


def _send(plan: Plan, held: Shards, ranks: Ranks) -> None:
    """The part of every rank but 0: its shards, in the order in which rank 0 asks for them."""
    for holder, offer in plan:
        if holder == ranks.rank:
            dist.send(held[offer.name, offer.part].value().contiguous().view(torch.uint8), 0)


def _announced(plan: Plan, stored: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> Announced:
    """Shape and dtype of every HF tensor of the plan."""
    announced = {}
    for _, offer in plan:
        for name, shape in zip(offer.sources, offer.placement.shapes, strict=True):
            kept = stored[name].dtype if name in stored else offer.dtype
            announced[name] = (shape, dtype or kept)
    return announced


def _plan(everyone: list[list[_Offer]]) -> Plan:
    """Every shard once, layer by layer; of copies, the lowest rank's."""
    chosen: dict[tuple[str, tuple[int, int]], tuple[int, _Offer]] = {}
    for rank, offers in enumerate(everyone):
        for offer in offers:
            chosen.setdefault((offer.name, offer.part), (rank, offer))
    return sorted(chosen.values(), key=lambda entry: _natural(entry[1].name, entry[1].part))


def _natural(name: str, part: tuple[int, int]) -> tuple[Any, ...]:
    """Sort key: numbers in names by value, so that layer 2 comes before layer 10."""
    words = tuple((int(word), "") if word.isdigit() else (-1, word) for word in name.split("."))
    return (words, part)


def _config_like(model: ModelConfig, source_folder: str | Path | None) -> tuple[dict[str, Any], Path | None]:
    """config.json for the model, like the source's where that is of the same architecture; and the source folder if that
    holds weights too."""
    folder = _folder(source_folder)
    if folder is not None and (folder / "config.json").is_file():
        like, is_whole = read_hf_config(folder), is_hf_folder(folder)
        is_quantised = bool(like.pop("quantization_config", None))
        try:
            config = hf_config_from_model(model, like)
            is_same = same_architecture(model, model_config_from_hf(config))
        except CheckpointError:
            if is_whole:
                raise
            is_same = False  # the config.json beside a tokenizer may be anything's
        if is_same or (is_whole and is_quantised):  # imported with modelopt
            return config, folder if is_whole and not is_quantised else None
    return hf_config_from_model(model, None), None


def _prepared(
    chunks: Sequence[nn.Module],
    model: ModelConfig,
    ranks: Ranks,
    source_folder: str | Path | None,
    dtype: torch.dtype | None,
) -> _Export:
    """Collective: everything about the new folder but the tensors' values; dtypes are rank 0's to know."""
    config, source = agree(lambda: _config_like(model, source_folder))
    held, everyone = _offered(chunks, model, family_of(config), ranks)
    plan = _plan(everyone)
    stored = agree(lambda: stored_tensors(source) if source is not None and ranks.rank == 0 else {})
    announced = _announced(plan, stored, dtype)
    copies = _stored_tied(config, stored)
    announced.update({copy: announced[original] for original, copy in copies.items()})
    config["torch_dtype"] = str(announced[plan[0][1].sources[0]][1]).removeprefix("torch.")
    if "dtype" in config:
        config["dtype"] = config["torch_dtype"]
    return _Export(config, plan, held, announced, copies)


def _write(folder: Path, export: _Export, source_folder: str | Path | None, begin: Callable[[Path], TensorWriter]) -> None:
    """Rank 0's part of save_hf. Raises SavingError."""
    shards = _shards(export.plan, export.held)
    try:
        with new_folder(folder, _folder(source_folder)) as temporary, one_thread():
            _copy_companions(source_folder, temporary)
            writer = begin(temporary)
            try:
                for name, tensor in _assembled(shards, export.plan, export.announced):
                    writer.write(name, tensor)
                    if name in export.copies:
                        writer.write(export.copies[name], tensor)
                writer.close()
            finally:
                writer.abandon()
    finally:
        for _ in shards:  # the other ranks' sends that are still to come
            pass


def _folder(source: str | Path | None) -> Path | None:
    """The source where it is a folder, no hub name."""
    return Path(source) if source and Path(source).is_dir() else None


def _stored_tied(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """{embedding: lm_head} when the source keeps both although they are tied, so that a round trip keeps both."""
    tensors = family_of(config).tensors
    copy, original = tensors[TIED][1], tensors["embedding.word_embeddings.weight"][1]
    return {original: copy} if config.get("tie_word_embeddings") and copy in stored else {}


def _assembled(
    shards: Iterator[tuple[_Offer, torch.Tensor]], plan: Plan, announced: Announced
) -> Iterator[tuple[str, torch.Tensor]]:
    """Puts shard after shard in its place; an HF tensor is yielded when its last shard has arrived, uncopied if it is one.

    A yielded tensor is valid until the next one: its memory is used again, which costs far less than fresh pages do.
    """
    free: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}
    waiting: dict[str, int] = {}
    for _, offer in plan:
        for name in offer.sources:
            waiting[name] = waiting.get(name, 0) + 1
    begun: dict[str, torch.Tensor] = {}
    for offer, local in shards:
        views = whole_sources(offer.placement, local) if local.device.type == "cpu" else {}
        views = {number: view for number, view in views.items() if view.dtype == announced[offer.sources[number]][1]}
        yield from ((offer.sources[number], view) for number, view in views.items())
        parts = {number: name for number, name in enumerate(offer.sources) if number not in views}
        for name in parts.values():
            if name not in begun:
                shape, dtype = announced[name]
                unused = free.get(announced[name])
                begun[name] = unused.pop() if unused else torch.empty(shape, dtype=dtype)
        write_shard(offer.placement, local, {number: begun[name] for number, name in parts.items()})
        for name in parts.values():
            waiting[name] -= 1
            if not waiting[name]:
                yield name, begun[name]
                free.setdefault(announced[name], []).append(begun.pop(name))


def _shards(plan: Plan, held: Shards) -> Iterator[tuple[_Offer, torch.Tensor]]:
    """Every shard of the model on rank 0, in the plan's order, one at a time."""
    for holder, offer in plan:
        if holder == 0:
            yield offer, held[offer.name, offer.part].value()
        else:
            local = torch.empty(offer.shape, dtype=offer.dtype, device=device())
            dist.recv(local.view(torch.uint8), holder)
            yield offer, local


def _copy_companions(source: str | Path | None, target: Path) -> None:
    """Tokenizer, chat template, generation settings, code that auto_map names, licence: every file without weights."""
    if not source:
        return
    folder = _folder(source)
    if folder is None:  # a hub name
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(str(source)).save_pretrained(target)
        return
    skipped = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in skipped and path.name not in {"config.json", INDEX}:
            shutil.copyfile(path, target / path.name)
