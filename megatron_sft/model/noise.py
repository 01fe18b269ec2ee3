"""Noise on embeddings while training (NEFTune): a pure function of seed, step, document, position and channel.

So one process and any cut over processes, any micro-batch and a resumed run add the same numbers to the same token. Not here:
where it is added (build.py).
"""

import torch

_GOLDEN, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
SLICE = 2**24
"""Elements that are drawn at once: 128 MB."""


def noise_keys(seed: int, iteration: int, document_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A number for each token of a row that is its own.

    Args:
        seed: of the run.
        iteration: of the step; a later epoch's noise is another one.
        document_ids: [d] int64.
        lengths: [d] int64, their tokens.

    Returns:
        [T] int64, T the sum of lengths.
    """
    start = _mixed(torch.tensor(seed, dtype=torch.int64)) + iteration
    documents = _mixed(_mixed(start) + document_ids)
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    return _mixed(documents.repeat_interleave(lengths) + position)


def neftune_bounds(alpha: float, lengths: torch.Tensor, hidden_size: int, is_real: torch.Tensor) -> torch.Tensor:
    """[T] float32: alpha / sqrt(L d) of each token's document of L tokens (NEFTune, arXiv 2310.05914, algorithm 1); 0 in padding.

    A document in a pack gets what it would get alone: L is its own length, neither the pack's nor a padded one.
    """
    bounds = alpha / (lengths.double() * hidden_size).clamp(min=1).sqrt()
    return torch.where(is_real, bounds, 0.0).float().repeat_interleave(lengths)


def add_noise(hidden: torch.Tensor, keys: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Embeddings and, for each channel, a number between -bound and bound, evenly distributed.

    Args:
        hidden: [T, 1, hidden].
        keys: [T] int64, noise_keys of these tokens.
        bounds: [T] float32.
    """
    rows = max(1, SLICE // hidden.shape[-1])
    parts = zip(keys.split(rows), bounds.split(rows), strict=True)
    noise = torch.cat([(_uniform(key, hidden.shape[-1]) * bound[:, None]).to(hidden.dtype) for key, bound in parts])
    return hidden + noise[:, None]


def _uniform(keys: torch.Tensor, width: int) -> torch.Tensor:
    """[T] -> [T, width] float32 in [-1, 1): 2^24 values, 0 among them."""
    channels = torch.arange(1, width + 1, device=keys.device) * _GOLDEN
    drawn = _mixed(keys[:, None] + channels)
    return _shifted(drawn, 40).float().mul_(2**-23).sub_(1)


def _mixed(value: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014); int64 products wrap as unsigned ones do."""
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift to the right that fills with 0, whatever the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
