"""FLOPs of every tiny family, packed, against torch.utils.flop_counter.

The counter counts whole blocks where attention and the scan need a part of them. They are counted in a form without waste: a
query over the keys that it sees, the scan as a recurrence. That both forms compute the same is asserted, too.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sft.config.run import ParallelConfig
from megatron_sft.model import attention, mamba
from megatron_sft.model.flops import computed_flops, forward_flops, peak_tflops, seen_pairs, train_flops
from megatron_sft.parallel import finalize, initialize
from tests.unit.hf.tiny_models import KEYS
from tests.unit.model.test_families import LENGTHS, make_pair, make_row, ours


@pytest.fixture(scope="module")
def ranks():
    yield initialize(ParallelConfig(), 1)
    finalize()


def one_query_at_a_time(self, query, key, value, offset, sinks):
    """PackedAttention._document with no key that a query does not see."""
    rows = []
    for place, one in enumerate(query.split(1), start=offset):
        low = max(0, place - self.window + 1) if self.window else 0
        heads = one.transpose(0, 1)[None], *(x[low : place + 1].transpose(0, 1)[None] for x in (key, value))
        output = attention._capped_attention(*heads, None, self.softmax_scale, self.softcap, sinks)
        rows.append(output[0].transpose(0, 1))
    return torch.cat(rows)


def recurrence(x, step, decay, b, c, skip, documents):
    """mamba.ssd_scan, token by token."""
    rows, state, repeats = [], torch.zeros(()), x.shape[1] // b.shape[1]
    for t in range(x.shape[0]):
        keys, queries = (value[t].repeat_interleave(repeats, 0)[..., None] for value in (b, c))
        goes_on = t > 0 and documents[t] == documents[t - 1]
        before = state * (step[t] * decay).exp()[:, None, None] if goes_on else 0
        state = before + torch.bmm((step[t, :, None] * x[t])[..., None], keys.transpose(1, 2))
        rows.append(torch.bmm(state, queries)[..., 0] + skip[:, None] * x[t])
    return torch.stack(rows), state


def grouped_flops(left, right, *args, out_shape=None, **kwargs):
    """[T, in] by [experts, in, out], each expert for its rows; or [out, T] by [T, in], each for its columns."""
    return 2 * left[0] * left[1] * right[-1]


@pytest.mark.parametrize("name", KEYS)
def test_flops_are_those_of_the_counter(name, tmp_path, ranks, monkeypatch):
    pair = make_pair(name, tmp_path, ranks, 4)
    row = make_row(LENGTHS, pair.model.vocab_size, 1)
    expected = ours(pair, row).detach()
    monkeypatch.setattr(attention.PackedAttention, "_document", one_query_at_a_time)
    monkeypatch.setattr(mamba, "ssd_scan", recurrence)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops}) as counter:
        losses = ours(pair, row)
        losses.sum().backward()
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-4, atol=1e-4)
    trained = int((row.mask > 0).sum())
    found = computed_flops(pair.model, np.array(LENGTHS), trained)
    latent = pair.model.mla.multi_latent_attention  # 0.19 fills values up to the width of queries, 0.4 % here
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01 if latent else 1e-12)
    forward = forward_flops(pair.model, np.array(LENGTHS), trained)
    assert found - train_flops(pair.model, np.array(LENGTHS), trained) == pytest.approx(forward["head"])  # its logits, twice


@pytest.mark.parametrize("method", ["uniform", "block"])
def test_recomputed_layers_are_counted_again(method, ranks, tmp_path, monkeypatch):
    from megatron_sft.config.run import TrainConfig
    from megatron_sft.model.build import build_model

    pair = make_pair("qwen3", tmp_path, ranks, 4)
    train = TrainConfig(recompute_granularity="full", recompute_method=method, recompute_num_layers=4)
    chunk = build_model(pair.model, ParallelConfig(), train)[0].train()
    chunk.load_state_dict(pair.chunk.state_dict())
    row = make_row(LENGTHS, pair.model.vocab_size, 1)
    monkeypatch.setattr(attention.PackedAttention, "_document", one_query_at_a_time)
    with FlopCounterMode(display=False) as counter:
        ours(pair._replace(chunk=chunk), row).sum().backward()
    found = computed_flops(pair.model, np.array(LENGTHS), int((row.mask > 0).sum()), recomputes=True)
    assert found == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (1, None), (5, None), (None, 4), (3, 4), (40, 40)])
def test_seen_pairs_are_counted_one_by_one(window, chunk):
    lengths = [7, 1, 20, 4]
    seen = sum(
        1
        for length in lengths
        for query in range(length)
        for key in range(query + 1)
        if (window is None or key > query - window) and (chunk is None or key // chunk == query // chunk)
    )
    assert seen_pairs(np.array(lengths), window, chunk) == seen


def test_a_deepseek_layer_is_not_counted_as_a_dense_one(tmp_path, ranks):
    """What the log divides by time: kinds that a layer has, over tokens of documents and trained tokens."""
    pair = make_pair("deepseek_v3", tmp_path, ranks, 4)
    forward = forward_flops(pair.model, np.array([10, 10]), 5)
    assert set(forward) == {"attention", "mlp", "experts", "head"}
    assert forward["mlp"] == 20 * 2 * 3 * 64 * 96  # one dense layer of 64 x 96
    experts = 2 * 3 * 64 * 48 * (2 + 1) + 2 * 64 * 4  # two of four run, and a shared one; the router of four
    assert forward["experts"] == 20 * 3 * experts
    assert forward["head"] == 5 * 2 * 64 * pair.model.vocab_size
    assert forward_flops(dataclasses.replace(pair.model, padded_vocab_size=999), np.array([10, 10]), 5) == forward


def test_the_peak_of_a_device_is_that_of_its_longest_name():
    names = (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A10G",
        "NVIDIA A10",
        "NVIDIA GH200 480GB",
    )
    assert [peak_tflops(name) for name in names] == [989.4, 756.0, 312.0, 70.0, 125.0, 989.4]
    assert peak_tflops("NVIDIA GeForce GTX 1080") is None and peak_tflops("Quadro RTX A1000") is None
