"""--kernels: a whole model trains with Triton's as with torch's, and what cannot run is refused."""

import dataclasses

import pytest
import torch

from megatron_sft import kernels, parallel
from megatron_sft.config.run import ParallelConfig
from megatron_sft.errors import ConfigError
from megatron_sft.kernels import takes_triton
from megatron_sft.model.attention import packed_seq_params
from megatron_sft.model.self_attention import PackedSelfAttention
from tests.gpu.training import MODEL, Training
from tests.triton_kernels import CLOSE, DEVICE, apart, needs_triton

MODELS = {
    "norms": MODEL,
    "no norm": dataclasses.replace(MODEL, qk_layernorm=False, num_query_groups=4, final_logit_softcapping=3.0),
    "zero-centered": dataclasses.replace(MODEL, norm_zero_centered=True, kv_channels=24),
    "two tables": dataclasses.replace(MODEL, rotary_base_local=100.0, window_size=9, window_layers=(True, False)),
    "not ours": dataclasses.replace(MODEL, rotary_percent=0.5),
}

COUNT = torch.arange(24)[None]
ROW = COUNT * 19, torch.cat((COUNT[:, :10], COUNT[:, :14]), dim=1), COUNT * 7, (COUNT % 3 > 0).float()
"""Tokens, positions, labels and mask of documents that end at ENDS."""
ENDS = torch.tensor([0, 10, 24], dtype=torch.int32)


@pytest.fixture(scope="module")
def ranks():
    yield parallel.initialize(ParallelConfig(), 1)
    parallel.finalize()


@needs_triton
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_torch(name, ranks):
    found = {}
    for word in ("torch", "triton"):
        training = Training.fresh("fp32", ranks, model=MODELS[name], kernels=word)
        layers = [module for module in training.chunks[0].modules() if isinstance(module, PackedSelfAttention)]
        assert [layer.fuses for layer in layers] == [word == "triton" and name != "not ours"] * 2
        tokens, places, labels, mask = (x.to(DEVICE) for x in ROW)
        documents = packed_seq_params(ENDS, 14, DEVICE)
        losses = training.chunks[0](tokens, places, None, labels=labels, loss_mask=mask, packed_seq_params=documents)
        losses.sum().backward()
        found[word] = losses, {name: p.main_grad.clone() for name, p in training.chunks[0].named_parameters()}
    (losses, grads), (triton_losses, triton_grads) = found["torch"], found["triton"]
    assert apart(triton_losses, losses) <= CLOSE
    assert {n: value for n, g in grads.items() if (value := apart(triton_grads[n], g)) > 2 * CLOSE} == {}


@needs_triton
def test_narrow_states_are_updated_by_the_kernel(ranks):
    training = Training.fresh("bf16", ranks, kernels="triton")
    assert training.optimizer.chained_optimizers[0].optimizer.triton is True


def test_auto_is_torch_and_what_lacks_is_said(monkeypatch):
    assert takes_triton("auto") is takes_triton("torch") is False
    monkeypatch.setattr(kernels, "triton_lacks", lambda: "there is no CUDA device")
    with pytest.raises(ConfigError) as error:
        takes_triton("triton")
    expected = "--kernels triton: there is no CUDA device. Expected a CUDA device, triton and a C compiler. Pass --kernels torch."
    assert error.value.problems == (expected,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_cpu_lacks_a_device_unless_triton_is_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.triton_lacks() in ("there is no CUDA device", "triton is not installed (pip install triton)")
