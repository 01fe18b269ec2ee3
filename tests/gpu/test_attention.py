"""Packed attention on the device, forward and backward, beside attention written out on the CPU in fp32.

bf16: as in flash-attention's own tests (Dao-AILab/flash-attention tests/test_flash_attn.py) the error may be twice, that of
gradients three times the error of attention written out in bf16. fp32: 1e-5 of the norm.
"""

import itertools

import pytest
import torch

from megatron_sft.config.run import ModelConfig, ParallelConfig, TrainConfig
from megatron_sft.model.attention import PackedAttention, fits_flash, packed_seq_params
from megatron_sft.model.build import transformer_config
from megatron_sft.parallel import finalize, initialize
from tests.gpu.place import CUDA, DEVICE, error, on_device

LENGTHS = [7, 1, 150, 65, 33]
CASES = {  # heads, groups, head_dim (of queries; of latent attention's values two thirds), ModelConfig fields
    "one-to-one": (4, 4, 64, {}),
    "grouped": (8, 2, 128, {}),
    "multi-query": (4, 1, 256, {}),
    "latent": (4, 4, 192, {}),
    "window": (4, 2, 64, dict(window_size=33)),
    "window-of-two": (4, 2, 64, dict(window_size=2)),
    "odd-head": (4, 2, 20, {}),
    "wide-head": (2, 1, 264, {}),
    "softcap": (4, 2, 64, dict(attn_logit_softcapping=5.0)),
    "chunked": (4, 2, 64, dict(attention_chunk_size=40)),
    "sinks": (4, 2, 64, dict(core={"softmax_type": "learnable"})),
}


@pytest.fixture(scope="module")
def groups():
    from megatron.core.process_groups_config import ProcessGroupCollection

    initialize(ParallelConfig(), 1)
    yield ProcessGroupCollection.use_mpu_process_groups()
    finalize()


def attention(case, dtype, groups, where):
    heads, kv, dim, fields = CASES[case]
    model = ModelConfig(
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=64,
        num_attention_heads=heads,
        num_query_groups=kv,
        kv_channels=dim,
        vocab_size=8,
        padded_vocab_size=8,
        max_position_embeddings=512,
        **fields,
    )
    config = transformer_config(model, ParallelConfig(), TrainConfig(params_dtype=dtype))
    module = PackedAttention(config, 1, None, "self", pg_collection=groups).to(where)
    if module.softmax_offset is not None:
        module.softmax_offset.data = torch.linspace(-1, 1, heads, device=where, dtype=module.softmax_offset.dtype)
    return module


def written_out(module, query, key, value):
    """Attention by its definition, one document after another, in the dtype of its inputs."""
    heads, parts = query.shape[1], []
    ends = [0, *itertools.accumulate(LENGTHS)]
    for first, last in itertools.pairwise(ends):
        q = query[first:last].transpose(0, 1)
        k, v = (x[first:last].transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0) for x in (key, value))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        if module.softcap is not None:
            scores = module.softcap * torch.tanh(scores / module.softcap)
        i, j = torch.arange(last - first)[:, None], torch.arange(last - first)[None]
        seen = j <= i
        if module.window is not None:
            seen &= j > i - module.window
        if module.chunk is not None:
            seen &= i // module.chunk == j // module.chunk
        scores = scores.masked_fill(~seen, -torch.inf)
        if module.softmax_offset is not None:
            sinks = module.softmax_offset.detach().to(scores.dtype)[:, None, None].expand(-1, last - first, 1)
            scores = torch.cat([scores, sinks], dim=2)
        parts.append((scores.softmax(dim=2)[..., : last - first] @ v).transpose(0, 1))
    return torch.cat(parts).flatten(1)


def run(function, tensors, upstream):
    """Output and the gradients of the three inputs, as given upstream."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, upstream.to(output))]


@on_device
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_packed_attention_is_what_its_definition_says(case, dtype, groups):
    compare(case, dtype, groups, lambda module, packed, *qkv: module(*qkv, None, packed_seq_params=packed))


@on_device
@pytest.mark.parametrize("case", ["grouped", "latent", "window", "chunked", "sinks"])
def test_parts_of_a_row_over_all_keys_are_the_row(case, groups):
    """What ranks of context parallelism do that gathered keys: flash attention with fewer queries than keys."""

    def by_part(module, packed, query, key, value):
        starts, sinks = range(0, len(query), 64), module.softmax_offset
        parts = [module.attend_part(query[at : at + 64], key, value, packed, at, sinks) for at in starts]
        return torch.cat(parts).flatten(1)

    compare(case, "bf16", groups, by_part)


def compare(case, dtype, groups, function):
    """Asserts that output and gradients of function(module, row, query, key, value) are those of the definition."""
    heads, kv, dim, _ = CASES[case]
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    generator = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)
    channels = dim * 2 // 3 if case == "latent" else dim
    shapes = ((heads, dim), (kv, dim), (kv, channels))
    drawn = [torch.randn(total, *shape, generator=generator).to(kind) for shape in shapes]
    upstream = torch.randn(total, heads * channels, generator=generator).to(kind)
    offsets = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    packed = packed_seq_params(offsets, max(LENGTHS), DEVICE)
    module, plain = attention(case, dtype, groups, DEVICE), attention(case, dtype, groups, "cpu")

    ours = run(lambda *qkv: function(module, packed, *qkv), [x.to(DEVICE) for x in drawn], upstream)
    exact = run(lambda *qkv: written_out(plain, *qkv), [x.float() for x in drawn], upstream)
    theirs = run(lambda *qkv: written_out(plain, *qkv), drawn, upstream)
    factors = [2, 3, 3, 3] if dtype == "bf16" else [0] * 4
    for name, our, true, their, factor in zip("oqkv", ours, exact, theirs, factors, strict=True):
        assert our.dtype == kind and our.device.type == DEVICE.type
        allowed = max(1e-5, factor * error(their, true))
        assert error(our, true) <= allowed, f"{name}: {error(our, true):.2e}, expected at most {allowed:.2e}"


@on_device
def test_flash_attention_takes_what_its_kernel_takes():
    def fits(dim, dtype=torch.bfloat16, value_dim=None):
        query = torch.empty(2, 2, dim, dtype=dtype, device=DEVICE)
        return fits_flash(query, torch.empty(2, 2, value_dim or dim, dtype=dtype, device=DEVICE))

    assert [fits(64), fits(128), fits(256), fits(192, value_dim=128)] == [CUDA] * 4
    assert not any([fits(264), fits(20), fits(64, torch.float32), fits(64, value_dim=128)])


@on_device
def test_documents_of_a_row_do_not_see_each_other(groups):
    """Other documents' keys and values may be anything, NaN too."""
    module = attention("grouped", "bf16", groups, DEVICE)
    packed = packed_seq_params(torch.tensor([0, 40, 100], dtype=torch.int32), 60, DEVICE)
    query, key, value = (torch.randn(100, n, 128, device=DEVICE, dtype=torch.bfloat16) for n in (8, 2, 2))
    before = module(query, key, value, None, packed_seq_params=packed)
    for tensor in (query, key, value):
        tensor[:40] = torch.nan
    after = module(query, key, value, None, packed_seq_params=packed)
    assert torch.equal(before[40:], after[40:]) and after[:40].isnan().any()
