"""The head and cross-entropy in one on the device, beside full logits in fp32 on the CPU."""

import pytest
import torch

from megatron_sft.model.loss import linear_cross_entropy
from tests.gpu.place import DEVICE, error, on_device


def plain(hidden, weight, labels, mask, vocab_size, softcap):
    logits = (hidden @ weight[:vocab_size].T).float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none") * (mask > 0)


@on_device
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loss_and_gradients_are_those_of_full_logits(dtype, softcap, monkeypatch):
    """fp32: 1e-5 of the norm. bf16: twice the error of full logits in bf16, gradients too."""
    monkeypatch.setattr("megatron_sft.model.loss.BLOCK_LOGITS", 1000 * 30)  # several blocks of the vocabulary
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) * 0.3 for n in (200, 1000))
    labels = torch.randint(0, 990, (200,), generator=generator)
    mask = torch.tensor([0.0, 1.0, 0.5, 1.0] * 50)

    def run(function, where, kind):
        leaves = [x.to(where, kind).requires_grad_() for x in (hidden, weight)]
        loss = function(*leaves, labels.to(where), mask.to(where))
        return [loss, *torch.autograd.grad((loss * mask.to(where)).sum(), leaves)]

    ours = run(lambda h, w, y, m: linear_cross_entropy(h, w, y, m, 990, None, softcap), DEVICE, dtype)
    exact = run(lambda h, w, y, m: plain(h, w, y, m, 990, softcap), "cpu", torch.float32)
    theirs = run(lambda h, w, y, m: plain(h, w, y, m, 990, softcap), "cpu", dtype)
    for name, our, true, their in zip(("loss", "hidden", "weight"), ours, exact, theirs, strict=True):
        allowed = 1e-5 if dtype == torch.float32 else max(1e-5, 2 * error(their, true))
        assert error(our, true) <= allowed, f"{name}: {error(our, true):.2e}, expected at most {allowed:.2e}"
    assert ours[0].dtype == torch.float32 and float(ours[0][mask.to(DEVICE) == 0].abs().max()) == 0


@on_device
def test_a_row_without_trained_tokens_costs_and_gives_nothing():
    hidden = torch.full((8, 16), torch.nan, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels, mask = torch.zeros(8, dtype=torch.int64, device=DEVICE), torch.zeros(8, device=DEVICE)
    linear_cross_entropy(hidden, weight, labels, mask, 32).sum().backward()
    assert float(hidden.grad.abs().max()) == float(weight.grad.abs().max()) == 0
