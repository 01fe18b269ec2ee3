"""Core attention over packed documents, in place of megatron-core's, which packs only with TransformerEngine.

1. context parallelism brings whole documents together (context.py);
2. CUDA: torch's varlen flash attention, sinks, chunks and gathered keys included; elsewhere, and for soft caps: one document at
   a time, in blocks of queries where a mask is needed. Never an S x S mask, and no scores kept for the backward pass.
"""

import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_sft.config.run import ModelConfig
from megatron_sft.core_compat import varlen_attention, varlen_kernels
from megatron_sft.model.cache import CachedSeqParams
from megatron_sft.model.context import Span, gather_keys, heads_to_tokens, spans_of, tokens_to_heads
from megatron_sft.model.flex import capped_attention, row_mask
from megatron_sft.model.pattern import layer_chunk, layer_window

QUERY_BLOCK = 512
"""Queries that share a mask of [QUERY_BLOCK, keys]."""


def packed_seq_params(cu_seqlens: torch.Tensor, max_seqlen: int, target: torch.device | None = None) -> PackedSeqParams:
    """megatron-core's description of a packed row.

    Args:
        cu_seqlens: [documents + 1] int32; lengths [3, 2] -> [0, 3, 5].
        max_seqlen: longest document, in tokens.
        target: device that cu_seqlens is moved to; None: it is where it is wanted. From page-locked host memory nothing waits.
    """
    moved = cu_seqlens if target is None else cu_seqlens.to(target, non_blocking=True)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=moved,
        cu_seqlens_kv=moved,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    if not cu_seqlens.is_cuda:
        packed.sft_ends = moved, cu_seqlens.tolist()  # type: ignore[attr-defined]
    return packed


def _kept(packed: PackedSeqParams, name: str) -> dict[Any, Any]:
    """What was made of a row for all its layers; empty where its documents are others."""
    cached = getattr(packed, name, None)
    if cached is None or cached[0] is not packed.cu_seqlens_q:
        cached = packed.cu_seqlens_q, {}
        setattr(packed, name, cached)
    return cast(dict[Any, Any], cached[1])


def _ends(packed: PackedSeqParams) -> list[int]:
    """cu_seqlens_q on the host; a device is waited for once per row, not once per layer."""
    cached = getattr(packed, "sft_ends", None)
    if cached is None or cached[0] is not packed.cu_seqlens_q:
        assert packed.cu_seqlens_q is not None, "a packed row has cu_seqlens_q"
        cached = packed.cu_seqlens_q, packed.cu_seqlens_q.tolist()
        packed.sft_ends = cached  # type: ignore[attr-defined]
    return cast(list[int], cached[1])


@dataclass(frozen=True)
class _Places:
    """What a varlen kernel wants to know of a part of a row: each span's queries see its keys, the last query all of them."""

    query_ends: torch.Tensor
    """[spans + 1] int32, on the device."""
    key_ends: torch.Tensor
    max_queries: int
    max_keys: int
    first_key: int
    """Of the whole row: where the first span's keys begin. Those of all spans lie behind one another from here on."""
    last_key: int

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return self.query_ends, self.key_ends, self.max_queries, self.max_keys


def _places(packed: PackedSeqParams, chunk: int | None, first: int, last: int) -> _Places:
    """Of the tokens first..last-1; made once per row, and once more for layers that cut it otherwise.

    cu_seqlens [0, 3, 8], no chunk, tokens 2..5: queries [0, 1, 4], keys [0, 3, 6] of the row's first 6.
    """
    whole = packed.cu_seqlens_q
    assert whole is not None, "a packed row has cu_seqlens_q"
    found: dict[Any, _Places] = _kept(packed, "sft_places")
    if (chunk, first, last) not in found:
        spans = spans_of(_ends(packed), chunk, first, last)
        queries, keys = [span.queries for span in spans], [span.keys for span in spans]
        ends = torch.tensor([[0, *itertools.accumulate(lengths)] for lengths in (queries, keys)], dtype=torch.int32)
        moved, begin = ends.to(whole.device, non_blocking=True), spans[0].first_key
        found[chunk, first, last] = _Places(moved[0], moved[1], max(queries), max(keys), begin, begin + sum(keys))
    return found[chunk, first, last]


def fits_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's flash attention takes these heads: bf16 or fp16, Ampere or newer, at most 256 channels.

    Values with fewer channels than queries (latent attention) are filled up with zeros.

    The limits: pytorch aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_fwd.
    """
    dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.shape[-1] <= dim <= 256
        and dim % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


class PackedAttention(torch.nn.Module):
    """Causal attention within each document of a packed row.

    The interface is megatron-core's core_attention (megatron/core/transformer/attention.py:CoreAttention).

    Args:
        config: the TransformerConfig that build.transformer_config made.
        layer_number: 1 for the first layer of the whole model.
        attn_mask_type: causal in every spec of ours.
        attention_type: self attention in every spec of ours.
        softmax_scale: None: 1 / sqrt(head_dim).
        cp_comm_type: not used; build_model sets it for the whole model.
        pg_collection: has the groups `cp` and `tp`.
        unused: k_channels and v_channels, which latent attention gives.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ):
        super().__init__()
        model: ModelConfig = config.sft_model
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.window = layer_window(model, layer_number - 1)
        self.chunk = layer_chunk(model, layer_number - 1)
        self.softcap = model.attn_logit_softcapping
        self.is_varlen, self.is_flex = config.sft_backend.is_varlen, config.sft_backend.is_flex
        self.cp_group, self.cp_comm_type = pg_collection.cp, config.sft_cp_comm_type
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // pg_collection.tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's description of the sinks, cut over heads (as in its extensions/transformer_engine.py)."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention of a packed row.

        Args:
            query: [tokens, heads, head_dim].
            key: [tokens, groups, head_dim].
            value: [tokens, groups, head_dim].
            packed_seq_params: where documents begin, in the whole row over all context-parallel ranks.

        Returns:
            [tokens, heads * head_dim].
        """
        assert packed_seq_params is not None, "PackedAttention needs packed_seq_params"
        if isinstance(packed_seq_params, CachedSeqParams):
            return self._with_cache(query, key, value, packed_seq_params)
        sinks, cp_size = self.softmax_offset, self.cp_group.size()
        if cp_size == 1:
            return self._attend(query, key, value, packed_seq_params, sinks).flatten(1)
        if self.cp_comm_type == "a2a":
            query, key, value = (tokens_to_heads(x, self.cp_group) for x in (query, key, value))
            if sinks is not None:
                sinks = sinks.chunk(cp_size)[self.cp_group.rank()]
            output = self._attend(query, key, value, packed_seq_params, sinks)
            return heads_to_tokens(output, self.cp_group).flatten(1)
        first = self.cp_group.rank() * query.shape[0]
        key, value = gather_keys(key, value, self.cp_group)
        return self.attend_part(query, key, value, packed_seq_params, first, sinks).flatten(1)

    def attend_part(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams, first: int, sinks: Any
    ) -> torch.Tensor:
        """Queries of the tokens from `first` on over keys and values of the whole row -> [tokens, heads, head_dim]."""
        last = first + query.shape[0]
        if self.is_varlen and fits_flash(query, value):
            places = _places(packed, self.chunk, first, last)
            seen = slice(places.first_key, places.last_key)
            return self._flash(query, key[seen], value[seen], places.arguments(), sinks)
        return self._by_span(query, key, value, spans_of(_ends(packed), self.chunk, first, last), sinks)

    def _with_cache(self, query: Any, key: Any, value: Any, cache: CachedSeqParams) -> torch.Tensor:
        """Generation: a whole row, with zeros for what stands behind its documents."""
        rows = query.shape[0]
        query, key, value = (x[: cache.tokens] for x in (query, key, value))
        if cache.decodes:
            output = self._decode(query, key, value, cache)
        else:
            cache.store(self.layer_number, key, value)
            output = self._attend(query, key, value, cache, self.softmax_offset).flatten(1)
        return F.pad(output, (0, 0, 0, rows - cache.tokens)) if rows > cache.tokens else output

    def _decode(self, query: Any, key: Any, value: Any, cache: CachedSeqParams) -> torch.Tensor:
        """One new token a document over all tokens before it and itself -> [documents, heads * head_dim]."""
        keys, values = cache.extend(self.layer_number, key, value)
        seen = cache.mask(self.window, self.chunk)
        if self.softmax_offset is not None or self.softcap is not None:
            heads = query[:, :, None]
            output = _capped_attention(heads, keys, values, seen, self.softmax_scale, self.softcap, self.softmax_offset)
        else:  # the heads of a group stand as so many queries: no key is repeated
            grouped = query.unflatten(1, (keys.shape[1], -1))
            output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=self.softmax_scale)
        return output.reshape(len(query), -1)

    def _attend(self, query: Any, key: Any, value: Any, packed: PackedSeqParams, sinks: Any) -> torch.Tensor:
        """Whole documents -> [tokens, heads, head_dim]."""
        if self.is_varlen and fits_flash(query, value):
            ends, longest = packed.cu_seqlens_q, packed.max_seqlen_q
            places = (ends, ends, longest, longest)
            if self.chunk is not None:
                places = _places(packed, self.chunk, 0, query.shape[0]).arguments()
            return self._flash(query, key, value, places, sinks)
        if self.is_flex and self.softcap is not None and self.chunk is None and sinks is None:
            return capped_attention(query, key, value, self._tiles(packed), self.softmax_scale, self.softcap)
        spans = spans_of(_ends(packed), self.chunk, 0, query.shape[0])
        return self._by_span(query, key, value, spans, sinks)

    def _flash(self, query: Any, key: Any, value: Any, places: tuple, sinks: Any) -> torch.Tensor:
        """All documents in one call. A causal mask is aligned at the end of queries and keys (flash attention since 2.1)."""
        channels = value.shape[-1]
        if channels != query.shape[-1]:
            value = F.pad(value, (0, query.shape[-1] - channels))
        window = (-1 if self.window is None else self.window - 1, 0)
        if sinks is None:
            output = varlen_attention()(query, key, value, *places, scale=self.softmax_scale, window_size=window)
        else:
            output = _FlashWithSinks.apply(query, key, value, sinks, places, self.softmax_scale, window)
        return cast(torch.Tensor, output)[..., :channels]  # a pair only where the log-sum-exp is asked for

    def _tiles(self, packed: PackedSeqParams) -> Any:
        """FlexAttention's mask of the row; made once per row and window."""
        found = _kept(packed, "sft_tiles")
        if self.window not in found:
            assert packed.cu_seqlens_q is not None, "a packed row has cu_seqlens_q"
            found[self.window] = row_mask(_ends(packed), self.window, packed.cu_seqlens_q.device)
        return found[self.window]

    def _by_span(self, query: Any, key: Any, value: Any, spans: list[Span], sinks: Any) -> torch.Tensor:
        """One document (or part of one) after another."""
        queries = query.split([span.queries for span in spans])
        whole = len(spans) > 0 and spans[0].first_key == 0 and sum(span.keys for span in spans) == key.shape[0]
        if whole:  # split, not slices: one gradient tensor for all documents
            sizes = [span.keys for span in spans]
            pairs = list(zip(key.split(sizes), value.split(sizes), strict=True))
        else:
            pairs = [tuple(x[span.first_key : span.first_key + span.keys] for x in (key, value)) for span in spans]
        parts = [self._document(q, k, v, span.offset, sinks) for q, (k, v), span in zip(queries, pairs, spans, strict=True)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _document(self, query: Any, key: Any, value: Any, offset: int, sinks: Any) -> torch.Tensor:
        """Queries at positions offset, offset + 1 ... over the keys of a document up to the last query."""
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # four dimensions: else SDPA is not fused
        grouped, length = q.shape[1] != k.shape[1], query.shape[0]
        special = sinks is not None or self.softcap is not None
        if not special and offset == 0 and (self.window is None or self.window >= length):
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped, scale=self.softmax_scale)
            return output[0].transpose(0, 1)
        blocks = []
        for first in range(0, length, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, length)
            low = max(0, offset + first - self.window + 1) if self.window else 0
            places = (offset + first, offset + last, low, self.window, query.device)
            parts = (q[:, :, first:last], k[:, :, low : offset + last], v[:, :, low : offset + last])
            if special:
                blocks.append(_CappedBlock.apply(*parts, sinks, places, self.softmax_scale, self.softcap))
            else:
                seen = _seen(*places)
                blocks.append(
                    F.scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=grouped, scale=self.softmax_scale)
                )
        return torch.cat(blocks, dim=2)[0].transpose(0, 1)


def _seen(first: int, last: int, low: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[last - first, last - low] bool: query positions first..last-1 over keys low..last-1."""
    queries = torch.arange(first, last, device=device)[:, None]
    keys = torch.arange(low, last, device=device)[None]
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


class _FlashWithSinks(torch.autograd.Function):
    """Varlen flash attention with a sink a head (arXiv 2309.17453) and its exact gradient.

    With lse a query's log-sum-exp without and l = log(exp lse + exp sink) that with its sink, the output is flash's times
    exp(lse - l). Flash's backward pass takes its output and log-sum-exp as they are given, so that it gives the gradients of
    this softmax for the pair with the sink; a sink's own is -sum over queries of exp(sink - l) (gradient . output).
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sinks: Any, places: tuple, scale: float | None, window: tuple) -> Any:
        ctx.rest = (*places[2:], window == (-1, 0)), (scale, list(window))
        output, lse, rng_state = varlen_kernels()[0](q, k, v, *places, window == (-1, 0), *ctx.rest[1])
        total = torch.logaddexp(lse, sinks.float()[:, None])
        output = (output * (lse - total).exp().T[..., None]).to(output.dtype)
        ctx.save_for_backward(q, k, v, sinks, output, total, *places[:2], rng_state)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v, sinks, output, total, *ends, rng_state = ctx.saved_tensors
        settings, last = ctx.rest
        grads = varlen_kernels()[1](grad.contiguous(), q, k, v, output, total, *ends, *settings, rng_state, *last)
        weighted = (grad.float() * output.float()).sum(dim=-1) * (sinks.float() - total.T).exp()  # [tokens, heads]
        return *grads, -weighted.sum(dim=0).to(sinks.dtype), None, None, None


class _CappedBlock(torch.autograd.Function):
    """_capped_attention of a block of queries, computed again for its gradient: scores are not kept, memory is linear."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sinks: Any, places: Any, scale: float | None, softcap: float | None) -> Any:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.places, ctx.settings = places, (scale, softcap)
        return _capped_attention(q, k, v, _seen(*places), scale, softcap, sinks)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        needed, (scale, softcap) = ctx.needs_input_grad[:4], ctx.settings
        leaves: list[Any] = [
            x if x is None else x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, needed, strict=True)
        ]
        q, k, v, sinks = leaves
        with torch.enable_grad():
            output = _capped_attention(q, k, v, _seen(*ctx.places), scale, softcap, sinks)
        gradients = iter(torch.autograd.grad(output, [leaf for leaf, n in zip(leaves, needed, strict=True) if n], grad))
        return *(next(gradients) if n else None for n in needed), None, None, None


def _capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft cap on the scores (arXiv 2408.00118) or a sink a head (arXiv 2309.17453), written out.

    Args:
        q: [batch, heads, queries, head_dim].
        k: [batch, groups, keys, head_dim].
        v: as k.
        seen: [queries, keys] bool, or with dimensions for batch and heads before them; None: everything.
        scale: None: 1 / sqrt(head_dim).
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [heads], a score that takes its share of the softmax and adds nothing.
    """
    groups, queries = k.shape[1], q.shape[2]

    def by_group(heads: torch.Tensor) -> torch.Tensor:  # the heads of a group as so many queries: no key is repeated
        return heads.unflatten(1, (groups, -1)).flatten(2, 3)

    def by_head(grouped: torch.Tensor) -> torch.Tensor:
        return grouped.unflatten(2, (-1, queries)).flatten(1, 2)

    scores = by_head(by_group(q) @ k.transpose(2, 3)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=3)
    shares = scores.softmax(dim=3)[..., : k.shape[2]].to(v.dtype)
    return by_head(by_group(shares) @ v)
