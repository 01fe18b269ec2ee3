"""Every kind of loss is its formula on full logits, value and gradient; noise belongs to a token, not to its place."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist

from megatron_sft.config.run import ParallelConfig
from megatron_sft.model.loss import TokenLoss, block_rows, linear_cross_entropy
from megatron_sft.model.noise import add_noise, neftune_bounds, noise_keys
from megatron_sft.parallel import initialize
from tests.gloo import run_ranks
from tests.triton_kernels import BOTH

VOCABULARY, TOKENS, WIDTH = 50, 30, 16
KINDS = {
    "sft": TokenLoss(),
    "smooth": TokenLoss(label_smoothing=0.1),
    "z": TokenLoss(z_loss=1e-2),
    "dft": TokenLoss("dft"),
    "eaft": TokenLoss("eaft"),
    "dft-smooth-z": TokenLoss("dft", 0.2, 1e-2),
    "eaft-smooth-z": TokenLoss("eaft", 0.2, 1e-2),
}


def transcribed(logits, labels, kind):
    """The formulas of the papers, in plain torch on full logits."""
    log_p = torch.log_softmax(logits, dim=-1)
    on_label = log_p.gather(-1, labels[..., None])[..., 0]
    weight = torch.ones_like(on_label)
    if kind.kind == "dft":
        weight = on_label.exp().detach()
    if kind.kind == "eaft":
        q = torch.softmax(logits.topk(20, dim=-1).values, dim=-1)
        weight = (-(q * q.log()).sum(-1) / torch.tensor(20.0).log()).detach()
    cost = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=kind.label_smoothing)
    return weight * cost + kind.z_loss * torch.logsumexp(logits, dim=-1) ** 2


def drawn():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(56, WIDTH, generator=generator) * 0.5  # 6 rows of padding
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, torch.tensor([0.0, 1.0, 0.5] * 10)


def expected(kind, softcap=None):
    """(weighted costs, gradient of states, gradient of weights) from full logits."""
    hidden, weight, labels, mask = drawn()
    logits = hidden @ weight[:VOCABULARY].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    cost = transcribed(logits, labels, kind) * mask
    return cost.detach(), *torch.autograd.grad(cost.sum(), (hidden, weight))


def apart(found, wanted):
    """Greatest difference, relative to the greatest element."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@BOTH
@pytest.mark.parametrize(("name", "softcap"), itertools.product(KINDS, (None, 2.0)))
def test_a_loss_is_its_formula_on_full_logits(name, softcap, triton, monkeypatch):
    monkeypatch.setattr("megatron_sft.model.loss.BLOCK_LOGITS", 20 * 11)  # of 50 rows, for 20 trained tokens
    monkeypatch.setattr("megatron_sft.model.loss.ALIGNED_ROWS", 1)
    hidden, weight, labels, mask = drawn()
    settings = VOCABULARY, None, softcap, KINDS[name], None, triton
    cost = linear_cross_entropy(hidden, weight, labels, mask, *settings) * mask
    found = cost.detach(), *torch.autograd.grad(cost.sum(), (hidden, weight))
    assert apart(found, expected(KINDS[name], softcap)) <= 1e-6


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [(151936, 16384, 4864), (151936, 4096, 4864), (49152, 1000, 16896), (128256, 1, 2**24), (7, 10**9, 256), (256, 0, 2**24)],
)
def test_rows_of_a_block_are_aligned(rows, tokens, expected):
    """A leading dimension that is no multiple of 8 numbers keeps cuBLAS from its kernels of 16-byte loads."""
    assert block_rows(rows, tokens) == expected and expected % 256 == 0


def cut_vocabulary(triton):
    """Every kind on one of two ranks, which has 28 rows: fewer than EAFT's 20 are real on the last of four."""
    ranks = initialize(ParallelConfig(tensor_model_parallel_size=dist_size()), 1)
    size, found = dist_size(), {}
    for name, kind in KINDS.items():
        hidden, weight, labels, mask = drawn()
        mine = weight.detach().chunk(size)[ranks.tp_rank].requires_grad_()
        settings = VOCABULARY, dist.group.WORLD, None, kind, None, triton
        cost = linear_cross_entropy(hidden, mine, labels, mask, *settings) * mask
        grads = torch.autograd.grad(cost.sum(), (hidden, mine))
        dist.all_reduce(grads[0])  # what copy_to_tensor_model_parallel_region does
        rows = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(rows, grads[1])
        found[name] = apart((cost.detach(), grads[0], torch.cat(rows)), expected(kind))
    return found


def dist_size():
    return int(os.environ["WORLD_SIZE"])


@BOTH
@pytest.mark.parametrize("size", [2, 4])
def test_a_loss_over_a_cut_vocabulary_is_its_formula(size, triton):
    for found in run_ranks(cut_vocabulary, size, triton):
        assert {name: value for name, value in found.items() if not value <= 1e-6} == {}


def test_noise_belongs_to_the_token_of_a_document():
    def noise(ids, lengths, iteration=4):
        ids, lengths = torch.tensor(ids), torch.tensor(lengths)
        keys, bounds = noise_keys(1, iteration, ids, lengths), neftune_bounds(5.0, lengths, 8, ids >= 0)
        return add_noise(torch.zeros(len(keys), 1, 8), keys, bounds)[:, 0].split(lengths.tolist())

    packed, alone = noise([7, 3, -1], [4, 400, 5]), noise([3], [400])
    assert torch.equal(packed[1], alone[0]) and not torch.equal(packed[0], alone[0][:4])
    assert packed[2].abs().max() == 0
    assert not torch.equal(noise([3], [400], iteration=5)[0], alone[0])
    bound = 5.0 / (400 * 8) ** 0.5
    assert 0.99 * bound < alone[0].abs().max() <= bound
    assert abs(float(alone[0].mean())) < 0.05 * bound  # of 3200 numbers: 0.01 expected
    assert float(alone[0].var()) == pytest.approx(bound**2 / 3, rel=0.1)
    assert abs(float((alone[0][1:] * alone[0][:-1]).mean())) < 0.1 * bound**2 / 3


def test_slices_do_not_show_in_the_noise(monkeypatch):
    keys, bounds = noise_keys(1, 0, torch.tensor([2]), torch.tensor([9])), torch.ones(9)
    whole = add_noise(torch.zeros(9, 1, 4), keys, bounds)
    monkeypatch.setattr("megatron_sft.model.noise.SLICE", 8)
    assert torch.equal(add_noise(torch.zeros(9, 1, 4), keys, bounds), whole)
