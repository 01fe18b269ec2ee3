"""A packed row gives what its documents give alone; positions decide the rotation; masked tokens cost nothing."""

import dataclasses

import pytest
import torch

from megatron_sft.config.run import ModelConfig, ParallelConfig, TrainConfig
from megatron_sft.errors import ConfigError
from megatron_sft.model.attention import packed_seq_params
from megatron_sft.model.build import build_model
from megatron_sft.model.context import Span, spans_of
from megatron_sft.model.loss import linear_cross_entropy
from megatron_sft.parallel import finalize, initialize

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=90,
    padded_vocab_size=96,
    max_position_embeddings=64,
    qk_layernorm=True,
)
LENGTHS = [7, 1, 20, 12]
VARIANTS = {
    "full": {},
    "window": dict(window_size=5, window_layers=(True, False)),
    "softcap": dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "chunked": dict(attention_chunk_size=6),
    "post-norms": dict(norm_placement="pre_post"),
}


@pytest.fixture(scope="module")
def ranks():
    yield initialize(ParallelConfig(), 1)
    finalize()


def fresh(model, ranks):
    chunk = build_model(model, ParallelConfig(), TrainConfig())[0]
    generator = torch.Generator().manual_seed(2)
    for parameter in chunk.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return chunk


def losses(chunk, tokens, labels, mask, lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = packed_seq_params(offsets, max(lengths))
    return chunk(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=packed)


def gradient(chunk):
    return torch.cat([p.grad.flatten() for p in chunk.parameters()])


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_one_by_one(name, ranks):
    chunk = fresh(dataclasses.replace(MODEL, **VARIANTS[name]), ranks)
    total = sum(LENGTHS)
    tokens, labels = torch.randint(0, 90, (1, total)), torch.randint(0, 90, (1, total))
    mask = (torch.rand(1, total) < 0.7).float()
    packed = losses(chunk, tokens, labels, mask, LENGTHS)
    packed.sum().backward()
    packed_gradient = gradient(chunk)
    chunk.zero_grad()
    alone = []
    for parts in zip(*(x.split(LENGTHS, dim=1) for x in (tokens, labels, mask)), strict=True):
        alone.append(losses(chunk, *parts, [parts[0].shape[1]]))
        alone[-1].sum().backward()
    assert (packed - torch.cat(alone, 1)).abs().max() <= 1e-5  # nats of single tokens, in the tens here
    assert (packed.sum() - torch.cat(alone, 1).sum()).abs() <= 1e-6 * packed.sum().abs()
    alone_gradient = gradient(chunk)
    assert (packed_gradient - alone_gradient).norm() <= 1e-5 * alone_gradient.norm()


def test_row_without_trained_tokens_gives_zero(ranks):
    chunk = fresh(MODEL, ranks)
    tokens = torch.randint(0, 90, (1, 8))
    loss = losses(chunk, tokens, tokens, torch.zeros(1, 8), [8])
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in chunk.parameters())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_linear_cross_entropy_equals_full_logits(softcap, monkeypatch):
    monkeypatch.setattr("megatron_sft.model.loss.BLOCK_LOGITS", 20 * 19)  # of 90 rows, for 20 trained tokens
    monkeypatch.setattr("megatron_sft.model.loss.ALIGNED_ROWS", 1)
    hidden = torch.randn(30, 16, requires_grad=True)
    weight = torch.randn(96, 16, requires_grad=True)
    labels, mask = torch.randint(0, 90, (30,)), torch.tensor([0.0, 1.0, 0.5] * 10)
    ours = linear_cross_entropy(hidden, weight, labels, mask, 90, None, softcap)
    mine = torch.autograd.grad((ours * mask).sum(), (hidden, weight))
    logits = hidden @ weight[:90].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * (mask > 0)
    theirs = torch.autograd.grad((plain * mask).sum(), (hidden, weight))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_spans_of_a_context_parallel_part():
    assert spans_of([0, 3, 8], None, 2, 6) == [Span(1, 2, 0), Span(3, 0, 3)]
    assert spans_of([0, 7], 3, 0, 7) == [Span(3, 0, 0), Span(3, 0, 3), Span(1, 0, 6)]


def test_what_megatron_core_refuses_is_said_in_its_words(ranks):
    train = TrainConfig(recompute_granularity="selective", recompute_modules=("core_attn", "moe_act"))
    with pytest.raises(ConfigError, match="refuses the model: moe_act in recompute_modules is only supported with"):
        build_model(MODEL, ParallelConfig(), train)


def test_unknown_core_setting_names_the_nearest(ranks):
    with pytest.raises(ConfigError, match="Did you mean moe_router_topk"):
        build_model(dataclasses.replace(MODEL, core={"moe_router_top_k": 2}), ParallelConfig(), TrainConfig())
