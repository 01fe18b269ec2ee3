"""The scan and the convolution of Mamba-2 over packed documents against transformers', one document at a time."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.nemotron_h.modeling_nemotron_h import causal_conv1d_fn, mamba2_chunk_scan

from megatron_sft.model.mamba import CHUNK, convolve, ssd_scan, ssd_step

LENGTHS = [CHUNK + 6, 1, 3, CHUNK, 2 * CHUNK + 2, 9]  # ends inside, at and beyond the ends of chunks
HEADS, HEAD_DIM, GROUPS, STATE = 8, 6, 2, 5
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def inputs():
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    x, step = torch.randn(tokens, HEADS, HEAD_DIM), torch.rand(tokens, HEADS) * 0.5
    decay, skip = -torch.rand(HEADS) * 4, torch.randn(HEADS)
    b, c = torch.randn(2, tokens, GROUPS, STATE)
    return [value.requires_grad_() for value in (x, step, decay, b, c, skip)]


def test_packed_scan_and_its_gradients_equal_transformers():
    x, step, decay, b, c, skip = values = inputs()
    found, _ = ssd_scan(*values, DOCUMENTS)
    documents = zip(*(value.split(LENGTHS) for value in (x, step, b, c)), strict=True)
    expected = torch.cat(
        [
            mamba2_chunk_scan(one[None], steps[None], decay, keys[None], queries[None], CHUNK, D=skip)[0]
            for one, steps, keys, queries in documents
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(found)
    mine = torch.autograd.grad((found * weight).sum(), values)
    for ours, theirs in zip(mine, torch.autograd.grad((expected * weight).sum(), values), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


class Names(TorchDispatchMode):
    """The operations that are called within it."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_deterministic_scan_takes_no_running_sum():
    """cumsum of floats, forward and backward, raises on CUDA under torch.use_deterministic_algorithms."""

    def scanned():
        values = inputs()
        out = ssd_scan(*values, DOCUMENTS)[0]
        return [out, *torch.autograd.grad(out.sum(), values)]

    with Names() as plain:
        expected = scanned()
    torch.use_deterministic_algorithms(True)
    try:
        with Names() as names:
            found = scanned()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "cumsum" in plain.found and "cumsum" not in names.found
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_document_does_not_see_the_one_before():
    x, step, decay, b, c, skip = (value.detach() for value in inputs())
    found = ssd_scan(x, step, decay, b, c, skip, DOCUMENTS)[0]
    x[: LENGTHS[0]] = torch.nan_to_num(x[: LENGTHS[0]] * 1e30)
    torch.testing.assert_close(ssd_scan(x, step, decay, b, c, skip, DOCUMENTS)[0][LENGTHS[0] :], found[LENGTHS[0] :])


def test_token_by_token_equals_the_scan():
    x, step, decay, b, c, skip = (value.detach() for value in inputs())
    found, last = ssd_scan(x, step, decay, b, c, skip, DOCUMENTS)
    first = sum(LENGTHS[:-1])
    state, rows = torch.zeros(2, HEADS, HEAD_DIM, STATE), []  # two documents alike
    for place in range(first, sum(LENGTHS)):
        columns = [value[place].expand(2, *value.shape[1:]) for value in (x, step, b, c)]
        out, state = ssd_step(state, *columns[:2], decay, *columns[2:], skip)
        rows.append(out)
    for document in range(2):
        torch.testing.assert_close(torch.stack(rows)[:, document], found[first:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[document], last, rtol=1e-5, atol=1e-5)


def test_packed_convolution_equals_transformers():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(sum(LENGTHS), 7), torch.randn(7, 4), torch.randn(7)
    expected = [causal_conv1d_fn(part.t()[None], weight, bias)[0].t() for part in x.split(LENGTHS)]
    torch.testing.assert_close(convolve(x, weight, bias, DOCUMENTS), torch.cat(expected))
