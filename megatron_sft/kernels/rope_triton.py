"""Triton's side of rope.py: a program has some tokens of one head, in two halves that RoPE turns against each other."""

import torch
import triton
import triton.language as tl

TOKENS = 32
"""Of a program."""


def forward(
    mixed: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys; arguments as in rope.py:norm_and_turn."""
    tokens, groups, slots, dim = _shape(mixed, table)
    query = mixed.new_empty(tokens, groups * (slots - 2), dim)
    key = mixed.new_empty(tokens, groups, dim)
    if tokens:
        weights = (mixed, mixed) if query_weight is None or key_weight is None else (query_weight, key_weight)
        _forward[(triton.cdiv(tokens, TOKENS), groups * (slots - 1))](
            *(mixed, table, *weights, query, key, tokens, table.stride(0), table.stride(1), eps),
            **_settings(groups, slots, dim, query_weight),
        )
    return query, key


def backward(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    mixed: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `mixed` and of the two weights; contiguous gradients, the rest as in rope.py:norm_and_turn."""
    tokens, groups, slots, dim = _shape(mixed, table)
    grad_mixed, queries = torch.empty_like(mixed), groups * (slots - 2)
    programs = triton.cdiv(tokens, TOKENS)
    normed = query_weight is not None and key_weight is not None
    parts = torch.empty(programs, queries + groups, dim, dtype=torch.float32, device=mixed.device) if normed else mixed
    if tokens:
        weights = (query_weight, key_weight) if normed else (mixed, mixed)
        _backward[(programs, groups * slots)](
            *(grad_query, grad_key, grad_value, mixed, table, *weights, grad_mixed, parts),
            *(tokens, table.stride(0), table.stride(1), eps),
            **_settings(groups, slots, dim, query_weight),
        )
    if query_weight is None or key_weight is None:
        return grad_mixed, None, None
    sums = parts.sum(dim=0)
    return grad_mixed, sums[:queries].sum(dim=0).to(query_weight.dtype), sums[queries:].sum(dim=0).to(key_weight.dtype)


def _shape(mixed: torch.Tensor, table: torch.Tensor) -> tuple[int, int, int, int]:
    tokens, groups, slots, dim = mixed.shape
    assert mixed.is_contiguous() and dim % 2 == 0 and slots > 2, "a contiguous projection of queries, a key and a value a group"
    assert table.shape == (tokens, 2, dim) and table.stride(2) == 1, "a table of all channels"
    return tokens, groups, slots, dim


def _settings(groups: int, slots: int, dim: int, query_weight: torch.Tensor | None) -> dict[str, int | bool]:
    half = dim // 2
    return dict(
        GROUPS=groups,
        SLOTS=slots,
        DIM=dim,
        HALF=half,
        WIDTH=triton.next_power_of_2(half),
        NORMED=query_weight is not None,
        TOKENS=TOKENS,
    )


@triton.jit
def _slot(head, QUERIES: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def] # Triton's own
    """Where a head is among those of a token in the projection; heads are counted queries first, then keys, then values."""
    of_query = (head // (SLOTS - 2)) * SLOTS + head % (SLOTS - 2)
    of_key = (head - QUERIES) * SLOTS + SLOTS - 2
    of_value = (head - QUERIES - GROUPS) * SLOTS + SLOTS - 1
    return tl.where(head < QUERIES, of_query, tl.where(head < QUERIES + GROUPS, of_key, of_value))


@triton.jit
def _halves(place, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of some heads, fp32; 0 outside."""
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _put(place, low, high, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(place, low.to(place.dtype.element_ty), mask=inside)
    tl.store(place + HALF, high.to(place.dtype.element_ty), mask=inside)


@triton.jit
def _inverse(low, high, eps, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """[tokens, 1] one over the root of the mean square."""
    mean = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / DIM
    return (1.0 / tl.sqrt_rn(mean + eps))[:, None]


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    mixed,
    table,
    query_weight,
    key_weight,
    query,
    key,
    tokens,
    table_token,
    table_row,
    eps,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    QUERIES: tl.constexpr = GROUPS * (SLOTS - 2)
    head = tl.program_id(1)
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (channel < HALF)
    source = mixed + (token * (GROUPS * SLOTS) + _slot(head, QUERIES, GROUPS, SLOTS)) * DIM + channel
    low, high = _halves(source, inside, HALF)
    if NORMED:
        inverse = _inverse(low, high, eps, DIM)
        if head < QUERIES:
            by_low, by_high = _halves(query_weight + channel, channel < HALF, HALF)
        else:
            by_low, by_high = _halves(key_weight + channel, channel < HALF, HALF)
        low = low * inverse * by_low
        high = high * inverse * by_high
    cos_low, cos_high = _halves(table + token * table_token + channel, inside, HALF)
    sin_low, sin_high = _halves(table + token * table_token + table_row + channel, inside, HALF)
    turned_low = low * cos_low - high * sin_low
    turned_high = high * cos_high + low * sin_high
    if head < QUERIES:
        _put(query + (token * QUERIES + head) * DIM + channel, turned_low, turned_high, inside, HALF)
    else:
        _put(key + (token * GROUPS + head - QUERIES) * DIM + channel, turned_low, turned_high, inside, HALF)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad_query,
    grad_key,
    grad_value,
    mixed,
    table,
    query_weight,
    key_weight,
    grad_mixed,
    parts,
    tokens,
    table_token,
    table_row,
    eps,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """With y = x r w, r = 1 / rms(x), and g the gradient by y: that by x is r (g w - x r mean(g w x r)), by w sum of g x r."""
    QUERIES: tl.constexpr = GROUPS * (SLOTS - 2)
    head = tl.program_id(1)
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (channel < HALF)
    place = (token * (GROUPS * SLOTS) + _slot(head, QUERIES, GROUPS, SLOTS)) * DIM + channel
    if head >= QUERIES + GROUPS:
        low, high = _halves(grad_value + (token * GROUPS + head - QUERIES - GROUPS) * DIM + channel, inside, HALF)
        _put(grad_mixed + place, low, high, inside, HALF)
    else:
        if head < QUERIES:
            grad_low, grad_high = _halves(grad_query + (token * QUERIES + head) * DIM + channel, inside, HALF)
        else:
            grad_low, grad_high = _halves(grad_key + (token * GROUPS + head - QUERIES) * DIM + channel, inside, HALF)
        cos_low, cos_high = _halves(table + token * table_token + channel, inside, HALF)
        sin_low, sin_high = _halves(table + token * table_token + table_row + channel, inside, HALF)
        low = grad_low * cos_low + grad_high * sin_high
        high = grad_high * cos_high - grad_low * sin_low
        if NORMED:
            x_low, x_high = _halves(mixed + place, inside, HALF)
            inverse = _inverse(x_low, x_high, eps, DIM)
            x_low = x_low * inverse
            x_high = x_high * inverse
            part = parts + (tl.program_id(0) * (QUERIES + GROUPS) + head) * DIM + tl.arange(0, WIDTH)
            tl.store(part, tl.sum(low * x_low, axis=0), mask=tl.arange(0, WIDTH) < HALF)
            tl.store(part + HALF, tl.sum(high * x_high, axis=0), mask=tl.arange(0, WIDTH) < HALF)
            if head < QUERIES:
                by_low, by_high = _halves(query_weight + channel, channel < HALF, HALF)
            else:
                by_low, by_high = _halves(key_weight + channel, channel < HALF, HALF)
            low = low * by_low
            high = high * by_high
            along = ((tl.sum(low * x_low, axis=1) + tl.sum(high * x_high, axis=1)) / DIM)[:, None]
            low = inverse * (low - x_low * along)
            high = inverse * (high - x_high * along)
        _put(grad_mixed + place, low, high, inside, HALF)
