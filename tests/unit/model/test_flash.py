"""The CUDA branch of PackedAttention with torch's varlen kernel, which a CPU has not, written out by its documentation."""

import itertools

import pytest
import torch
from torch.nn.attention import varlen

from megatron_sft.config.run import ParallelConfig
from megatron_sft.core_compat import varlen_kernels
from megatron_sft.model import attention
from megatron_sft.model.attention import PackedAttention, packed_seq_params
from megatron_sft.parallel import finalize, initialize
from tests.gloo import run_ranks
from tests.gpu.test_attention import CASES
from tests.gpu.test_attention import attention as module_of

LENGTHS = [7, 1, 60, 12]


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """torch 2.11's varlen_attn: grouped queries unasked, window (left, right) around the query, -1 for no limit."""
    return written_out(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)[0]


def documents(cu_seq_q, cu_seq_k):
    """Slices of queries and of keys, and how far each query stands behind each key; the last of both stand together."""
    pairs = zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True)
    for (first, last), (low, high) in pairs:
        places = torch.arange(last - first) + (high - low) - (last - first)
        yield slice(first, last), slice(low, high), places[:, None] - torch.arange(high - low)[None]


def written_out(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
    """Output and log-sum-exp [heads, tokens]."""
    for ends, longest in ((cu_seq_q, max_q), (cu_seq_k, max_k)):
        assert (longest, ends.dtype, type(longest)) == (int(ends.diff().max()), torch.int32, int)
    assert (len(query), len(key)) == (int(cu_seq_q[-1]), int(cu_seq_k[-1]))
    assert query.shape[2] == key.shape[2] == value.shape[2], "one width for queries, keys and values"
    parts, sums, repeats = [], [], query.shape[1] // key.shape[1]
    for asked, met, distance in documents(cu_seq_q, cu_seq_k):
        q, k, v = query[asked].transpose(0, 1), key[met].transpose(0, 1), value[met].transpose(0, 1)
        left, right = window_size
        seen = (distance <= left if left >= 0 else torch.tensor(True)) & (
            distance >= -right if right >= 0 else torch.tensor(True)
        )
        scores = q @ k.repeat_interleave(repeats, 0).transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        scores = scores.masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v.repeat_interleave(repeats, 0)).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(parts), torch.cat(sums, dim=1)


def forward_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size):
    """torch_attn::_varlen_attn."""
    assert is_causal == (window_size == [-1, 0])
    return *written_out(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size), torch.zeros(2)


def backward_kernel(grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, state, scale, window_size):
    """torch_attn::_varlen_attn_backward: softmax by the log-sum-exp that is given, its gradient by the output that is given."""
    scale, found = scale or query.shape[-1] ** -0.5, [torch.zeros_like(x) for x in (query, key, value)]
    repeats = query.shape[1] // key.shape[1]
    for asked, met, distance in documents(cu_seq_q, cu_seq_k):
        q, o, g = (x[asked].transpose(0, 1) for x in (query, out, grad))
        k, v = (x[met].transpose(0, 1).repeat_interleave(repeats, 0) for x in (key, value))
        seen = (distance >= 0) & (distance <= (window_size[0] if window_size[0] >= 0 else len(key)))
        shares = torch.where(seen, (q @ k.transpose(1, 2) * scale - lse[:, asked, None]).exp(), 0)
        slopes = shares * (g @ v.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scale
        parts = (slopes @ k, (slopes.transpose(1, 2) @ q), shares.transpose(1, 2) @ g)
        for whole, part, place, count in zip(found, parts, (asked, met, met), (1, repeats, repeats), strict=True):
            whole[place] = part.unflatten(0, (-1, count)).sum(1).transpose(0, 1)
    return tuple(found)


@pytest.fixture(scope="module")
def groups():
    from megatron.core.process_groups_config import ProcessGroupCollection

    initialize(ParallelConfig(), 1)
    yield ProcessGroupCollection.use_mpu_process_groups()
    finalize()


CASES["window-and-sinks"] = (8, 2, 64, dict(window_size=9, core={"softmax_type": "learnable"}))


FLASH = ("one-to-one", "grouped", "latent", "window", "window-of-two", "chunked", "sinks", "window-and-sinks")


def drawn(case, length):
    """Queries, keys and values of a case; what a rank of its own draws is every rank's."""
    heads, kv, dim, _ = CASES[case]
    torch.manual_seed(0)
    shapes = ((heads, dim), (kv, dim), (kv, dim * 2 // 3 if case == "latent" else dim))
    return [torch.randn(length, *shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("case", FLASH)
def test_flash_branch_is_the_other_branch(case, groups, monkeypatch):
    module: PackedAttention = module_of(case, "fp32", groups, "cpu")
    tensors = drawn(case, sum(LENGTHS))
    packed = packed_seq_params(torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32), max(LENGTHS))
    leaves = [*tensors, *([] if module.softmax_offset is None else [module.softmax_offset])]
    by_document = module(*tensors, None, packed_seq_params=packed)
    upstream = torch.randn_like(by_document)
    expected = torch.autograd.grad(by_document, leaves, upstream)
    take_kernels(monkeypatch)
    by_kernel = module(*tensors, None, packed_seq_params=packed)
    torch.testing.assert_close(by_kernel, by_document, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(by_kernel, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def take_kernels(patch):
    patch.setattr(attention, "varlen_kernels", lambda: (forward_kernel, backward_kernel))
    patch.setattr(varlen, "varlen_attn", kernel)
    patch.setattr(attention, "fits_flash", lambda query, value: True)


def over_context_ranks():
    """Each case on one of four ranks that gather keys: by document, then in one call; twice, for what is kept of a row."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    ranks, found = initialize(ParallelConfig(context_parallel_size=4, cp_comm_type="allgather"), 1), {}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with pytest.MonkeyPatch.context() as patch:
        for by_kernel in (False, True):
            if by_kernel:
                take_kernels(patch)
            for case in FLASH:
                module = module_of(case, "fp32", groups, "cpu")
                module.cp_comm_type = "allgather"
                mine = [x.detach().chunk(4)[ranks.cp_rank].requires_grad_() for x in drawn(case, sum(LENGTHS))]
                packed = packed_seq_params(torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32), max(LENGTHS))
                leaves = [*mine, *([] if module.softmax_offset is None else [module.softmax_offset])]
                for _ in range(2):
                    output = module(*mine, None, packed_seq_params=packed)
                    grads = torch.autograd.grad(output.square().sum(), leaves)
                found[case, by_kernel] = [x.detach().clone() for x in (output, *grads)]
    finalize()
    return found


def test_gathered_keys_in_one_call_are_those_of_each_document():
    """Of 20 tokens each: two documents and the begin of a third, two parts within it, its end and a whole document."""
    for found in run_ranks(over_context_ranks, 4):
        for case in FLASH:
            for ours, theirs in zip(found[case, True], found[case, False], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, case=case: f"{case}: {text}")


def test_torch_has_the_kernels_whose_sums_are_used():
    """The names of their first arguments and what they give; no CPU can call them."""
    forward, backward = (kernel.default._schema for kernel in varlen_kernels())
    places = ["cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal"]
    inputs, rest = ["query", "key", "value"], ["scale", "window_size"]
    assert [argument.name for argument in forward.arguments][:10] == [*inputs, *places, *rest]
    assert [argument.name for argument in backward.arguments] == ["grad_out", *inputs, "out", "lse", *places, "rng_state", *rest]
    assert len(forward.returns) == len(backward.returns) == 3


@pytest.mark.parametrize("case", ["sinks", "softcap"])
def test_no_score_is_kept_and_no_number_changes(case, groups, monkeypatch):
    """Twice the tokens keep twice the bytes; gradients are those of scores that are kept, bit by bit."""
    heads, kv, dim, _ = CASES[case]
    module: PackedAttention = module_of(case, "fp32", groups, "cpu")
    found, kept = {}, {}
    for name, length in (("linear", 600), ("linear", 1200), ("direct", 1200)):
        if name == "direct":
            monkeypatch.setattr(attention._CappedBlock, "apply", direct)
        torch.manual_seed(0)
        leaves = [torch.randn(length, count, dim, requires_grad=True) for count in (heads, kv, kv)]
        packed = packed_seq_params(torch.tensor([0, length], dtype=torch.int32), length)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: keep(x, saved), lambda x: x):
            output = module(*leaves, None, packed_seq_params=packed)
        kept[name, length] = sum(saved.values())
        found[name] = [output, *torch.autograd.grad(output.square().sum(), [*leaves, *module.parameters()])]
    assert kept["linear", 1200] <= 2.01 * kept["linear", 600] and kept["direct", 1200] > 4 * kept["linear", 1200]
    assert all(torch.equal(*pair) for pair in zip(found["linear"], found["direct"], strict=True))


def keep(tensor, saved):
    storage = tensor.untyped_storage()
    saved[storage.data_ptr()] = storage.nbytes()
    return tensor


def direct(q, k, v, sinks, places, scale, softcap):
    return attention._capped_attention(q, k, v, attention._seen(*places), scale, softcap, sinks)
