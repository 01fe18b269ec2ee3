"""Every family of families.py against transformers, fp32: logits, losses, all gradients, and 20 steps of training.

`python -m tests.unit.model.test_families 2>/dev/null` prints the largest differences of every family, and the bars.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from megatron_sft.config.run import ModelConfig, ParallelConfig, TrainConfig
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.exporter import exported_tensors
from megatron_sft.hf.weights import load_hf_weights
from megatron_sft.model.attention import packed_seq_params
from megatron_sft.model.build import build_model
from megatron_sft.parallel import Ranks, finalize, initialize
from tests.unit.hf.tiny_models import KEYS, tiny_folder

LENGTHS = [14, 1, 4, 11]
CURVE_LENGTHS = [12, 12]
STEPS = 20


class Pair(NamedTuple):
    """The same weights twice."""

    chunk: Any
    theirs: Any
    model: ModelConfig
    folder: Path
    ranks: Ranks


class Row(NamedTuple):
    """A packed row."""

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    lengths: list[int]


@pytest.fixture(scope="module")
def ranks():
    yield initialize(ParallelConfig(), 1)
    finalize()


def make_pair(name: str, folder: Path, ranks: Ranks, num_layers: int) -> Pair:
    theirs = tiny_folder(name, folder, num_layers=num_layers)
    model = model_config_from_hf(read_hf_config(folder))
    model = dataclasses.replace(model, padded_vocab_size=model.vocab_size + 5)
    model.core.pop("moe_aux_loss_coeff", None)  # transformers adds it to the loss only when asked to
    chunk = build_model(model, ParallelConfig(), TrainConfig())[0]
    load_hf_weights([chunk], model, folder, ranks)
    return Pair(chunk, theirs, model, folder, ranks)


def make_row(lengths: list[int], vocab_size: int, seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(3, vocab_size, (2, 1, sum(lengths)), generator=generator)
    mask = (torch.rand(1, sum(lengths), generator=generator) < 0.6).float()
    return Row(tokens, labels, mask, lengths)


def ours(pair: Pair, row: Row, with_labels: bool = True) -> torch.Tensor:
    """Per-token losses [1, T] of a packed row, or logits [1, T, vocab_size]."""
    positions = torch.cat([torch.arange(n) for n in row.lengths])[None]
    offsets = torch.tensor([0, *row.lengths]).cumsum(0).to(torch.int32)
    packed = packed_seq_params(offsets, max(row.lengths))
    if with_labels:
        return pair.chunk(row.tokens, positions, None, labels=row.labels, loss_mask=row.mask, packed_seq_params=packed)
    return pair.chunk(row.tokens, positions, None, packed_seq_params=packed)[..., : pair.model.vocab_size]


def their_logits(pair: Pair, row: Row) -> torch.Tensor:
    """One document after the other; documents of one length as a batch."""
    parts = row.tokens.split(row.lengths, dim=1)
    if len(set(row.lengths)) == 1:
        return pair.theirs(torch.cat(parts), use_cache=False).logits.flatten(0, 1)[None]
    return torch.cat([pair.theirs(part, use_cache=False).logits for part in parts], dim=1)


def cross_entropy(logits: torch.Tensor, row: Row) -> torch.Tensor:
    return (torch.nn.functional.cross_entropy(logits[0], row.labels[0], reduction="none") * row.mask[0])[None]


def gradients(pair: Pair) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(ours, theirs) by HF name: gradients take the places of the weights, and each side exports them its own way."""
    for model in (pair.chunk, pair.theirs):
        for parameter in model.parameters():  # an expert that no token visited has none
            parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    mine = {name: tensor.clone() for name, tensor in exported_tensors([pair.chunk], pair.model, pair.folder, pair.ranks)}
    pair.theirs.save_pretrained(pair.folder / "gradients")
    wanted = load_file(pair.folder / "gradients" / "model.safetensors")
    assert mine.keys() == wanted.keys()
    return {name: (mine[name], wanted[name]) for name in wanted if "e_score_correction_bias" not in name}


def worst_gradient(pair: Pair) -> tuple[float, str]:
    """Largest |ours - theirs| / |theirs| over all tensors; a tensor that is nearly 0 is measured against all together."""
    pairs = gradients(pair)
    floor = 1e-3 * max(float(theirs.norm()) for _, theirs in pairs.values())
    return max((float((a - b).norm()) / max(float(b.norm()), floor), name) for name, (a, b) in pairs.items())


def compare(name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Largest differences of logits, losses and gradients."""
    pair = make_pair(name, folder, ranks, 4)
    row = make_row(LENGTHS, pair.model.vocab_size, 1)
    expected = their_logits(pair, row)
    with torch.no_grad():
        logits = ours(pair, row, with_labels=False)
    losses, reference = ours(pair, row), cross_entropy(expected, row)
    losses.sum().backward()
    reference.sum().backward()
    found = {
        "logits": float((logits - expected).abs().max()),
        "loss": float((losses - reference).abs().max()),
    }
    found["gradient"], found["tensor"] = worst_gradient(pair)
    return found


def documents(row: Row) -> list[Row]:
    """Each document of the row as a row of its own."""
    parts = (tensor.split(row.lengths, dim=1) for tensor in (row.tokens, row.labels, row.mask))
    return [Row(*part, [length]) for *part, length in zip(*parts, row.lengths, strict=True)]


def curve(name: str, folder: Path, ranks: Ranks) -> float:
    """Largest difference between the losses of 20 steps of AdamW; ours has documents packed, then alone, by turns."""
    pair = make_pair(name, folder, ranks, 2)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for model in (pair.chunk, pair.theirs)]
    worst = 0.0
    for step in range(STEPS):
        row = make_row(CURVE_LENGTHS, pair.model.vocab_size, step % 4)
        rows = [row] if step % 2 else documents(row)
        mine = sum((ours(pair, part).sum() for part in rows), torch.zeros(())) / row.mask.sum()
        reference = cross_entropy(their_logits(pair, row), row).sum() / row.mask.sum()
        worst = max(worst, abs(float(mine - reference)))
        for loss, optimizer in zip((mine, reference), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return worst


@pytest.mark.parametrize("name", KEYS)
def test_logits_losses_and_gradients_equal_transformers(name, tmp_path, ranks):
    found = compare(name, tmp_path, ranks)
    assert found["logits"] <= 1e-4
    assert found["loss"] <= 1e-5
    assert found["gradient"] <= 1e-4, found["tensor"]


@pytest.mark.parametrize("name", KEYS)
def test_twenty_steps_equal_transformers(name, tmp_path, ranks):
    assert curve(name, tmp_path, ranks) <= 1e-4


def main() -> None:
    ranks = initialize(ParallelConfig(), 1)
    print("| model | logits | loss | gradient | 20 steps |\n| --- | --- | --- | --- | --- |")
    print("| bar | 1.0e-04 | 1.0e-05 | 1.0e-04 | 1.0e-04 |")
    for name in KEYS:
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            found = compare(name, Path(first), ranks)
            steps = curve(name, Path(second), ranks)
        print(f"| {name} | {found['logits']:.1e} | {found['loss']:.1e} | {found['gradient']:.1e} | {steps:.1e} |")
    finalize()


if __name__ == "__main__":
    main()
