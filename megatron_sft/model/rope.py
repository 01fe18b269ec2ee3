"""Rotary position embeddings: frequencies as Hugging Face configurations describe them, applied by position_ids.

The frequencies follow transformers (src/transformers/modeling_rope_utils.py, v5): default, linear, llama3, yarn, longrope.
The turn is one autograd function that saves only the table: no copy of queries and keys is kept for backward.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_sft.config.run import ModelConfig
from megatron_sft.errors import ConfigError


class RotaryTable:
    """Cosines and sines of a model's positions.

    Args:
        model: rotary_base, rotary_percent, rope_scaling, rotary_base_local.
        dim: width of the turned part of a head; None: rotary_percent of kv_channels.
    """

    def __init__(self, model: ModelConfig, dim: int | None = None):
        self._dim = dim or int(model.kv_channels * model.rotary_percent)
        self._model = model
        self._interleaved = model.rotary_interleaved or model.mla.multi_latent_attention
        scaling = model.rope_scaling or {}
        self.original_positions: int | None = None
        """longrope: documents longer than this have other frequencies."""
        if scaling.get("rope_type") == "longrope":
            self.original_positions = scaling.get("original_max_position_embeddings") or model.max_position_embeddings
        self.inverse_frequencies(max_seqlen=1)  # an unknown kind of scaling fails here, not in the first step
        self._moved: dict[tuple[int, torch.device], list[tuple[torch.Tensor, float]]] = {}

    def inverse_frequencies(self, max_seqlen: int) -> list[tuple[torch.Tensor, float]]:
        """Of the layers with full attention, then, where they differ, of those with a window: ([dim / 2], factor)."""
        model = self._model
        positions = model.max_position_embeddings
        kinds = [scaled_frequencies(self._dim, model.rotary_base, model.rope_scaling or {}, positions, max_seqlen)]
        if model.rotary_base_local is not None:
            kinds.append((_frequencies(self._dim, model.rotary_base_local), 1.0))
        return kinds

    def gather(self, position_ids: torch.Tensor, lengths: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The table of a row of tokens.

        Args:
            position_ids: [1, T] int64.
            lengths: [T], the length of each token's document; None where original_positions is None.
            dtype: of the activations.

        Returns:
            [T, kinds, 2, dim]: cosines and sines; with rotary_interleaved each value twice in a row, else two halves.
            The last kind scales queries by position, where attn_temperature_scale asks for it.
        """
        positions = position_ids.flatten().float()
        rows = self._rows(positions, 1)
        if lengths is not None and self.original_positions is not None:
            is_long = (lengths > self.original_positions)[:, None, None]
            longer = self._rows(positions, self.original_positions + 1)
            rows = [torch.where(is_long, long, short) for long, short in zip(longer, rows, strict=True)]
        if self._model.attn_temperature_scale is not None:
            steps = torch.floor((positions + 1) / self._model.attn_temperature_floor)
            scales = 1 + self._model.attn_temperature_scale * torch.log1p(steps)
            cosines = scales[:, None].expand(-1, self._dim)
            rows.append(torch.stack((cosines, torch.zeros_like(cosines)), dim=1))
        return torch.stack(rows, dim=1).to(dtype)

    def _rows(self, positions: torch.Tensor, max_seqlen: int) -> list[torch.Tensor]:
        """[T, 2, dim] a kind."""
        rows, key = [], (max_seqlen, positions.device)
        if key not in self._moved:  # once: a copy from the host waits for the device
            self._moved[key] = [(f.to(positions.device), factor) for f, factor in self.inverse_frequencies(max_seqlen)]
        for frequencies, factor in self._moved[key]:
            angles = torch.outer(positions, frequencies)
            angles = angles.repeat_interleave(2, dim=1) if self._interleaved else torch.cat((angles, angles), dim=1)
            rows.append(torch.stack((angles.cos() * factor, angles.sin() * factor), dim=1))
        return rows


def _frequencies(dim: int, base: float) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def scaled_frequencies(
    dim: int, base: float, scaling: Mapping[str, Any], max_positions: int, max_seqlen: int
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [dim / 2] float32 and the factor on cosines and sines, of a rope_scaling mapping."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    plain = _frequencies(dim, base)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    original = scaling.get("original_max_position_embeddings") or max_positions
    factor = scaling.get("factor") or max_positions / original
    if kind == "yarn":
        return _yarn(plain, dim, base, scaling, original, factor), _yarn_attention(scaling, factor)
    if kind == "longrope":
        divisors = scaling["long_factor" if max_seqlen > original else "short_factor"]
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return plain / torch.tensor(divisors), scaling.get("attention_factor") or attention
    raise ConfigError(
        [f"rope_scaling: unknown rope_type {kind!r}; expected default, linear, llama3, yarn or longrope. Use another model."]
    )


def _llama3(plain: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between mixed."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / factor + share * plain


def _yarn(plain: torch.Tensor, dim: int, base: float, scaling: Mapping[str, Any], original: int, factor: float) -> torch.Tensor:
    """arXiv 2309.00071, section 3.2."""
    bounds = [
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
    ]
    if scaling.get("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp)


def _yarn_attention(scaling: Mapping[str, Any], factor: float) -> float:
    """The factor on cosines and sines: attention_factor, or what mscale says."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's correction of the softmax temperature."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(heads: torch.Tensor, table: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Turns the first `dim` channels of each head.

    Args:
        heads: [T, heads, head_dim].
        table: [T, 2, dim], from RotaryTable.gather (one kind).
        interleaved: pairs are channels (0, 1), (2, 3) ...; else (0, dim / 2), (1, dim / 2 + 1) ...
    """
    if not torch.is_grad_enabled():
        return _turned(heads, table, interleaved, 1)
    return _Rotate.apply(heads, table, interleaved)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        return _turned(heads, table, interleaved, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return _turned(grad, table, ctx.interleaved, -1), None, None


def _turned(heads: torch.Tensor, table: torch.Tensor, interleaved: bool, sign: int) -> torch.Tensor:
    dim = table.shape[-1]
    cosines, sines = table[:, 0, None], table[:, 1, None]
    turned = heads[..., :dim]
    output = heads.clone(memory_format=torch.contiguous_format) if dim < heads.shape[-1] else None
    result = torch.mul(turned, cosines)
    first, second = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
    result[..., first].addcmul_(turned[..., second], sines[..., first], value=-sign)
    result[..., second].addcmul_(turned[..., first], sines[..., second], value=sign)
    if output is None:
        return result
    output[..., :dim] = result
    return output
