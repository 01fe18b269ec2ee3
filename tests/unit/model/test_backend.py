"""--attention-backend: what is chosen, why, and what is refused, by what the machine and the model have."""

import dataclasses

import pytest
import torch

from megatron_sft.errors import ConfigError
from megatron_sft.model import backend
from megatron_sft.model.backend import choose_backend
from tests.gpu.training import MODEL

CAPPED = dataclasses.replace(MODEL, attn_logit_softcapping=30.0)


def machine(patch, capability=None):
    """One without CUDA, or with a device of this compute capability."""
    patch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("word", "capability", "model", "dtype", "is_varlen", "reason"),
    [
        ("auto", None, MODEL, "bf16", False, "one document after another (--attention-backend auto: there is no CUDA device)"),
        ("fused", None, MODEL, "bf16", False, "one document after another (--attention-backend fused: there is no CUDA device)"),
        ("sdpa", (9, 0), MODEL, "bf16", False, "one document after another (--attention-backend sdpa)"),
        ("auto", (9, 0), MODEL, "bf16", True, "torch's FlashAttention 2, all documents in one call (--attention-backend auto)"),
        ("flash2", (8, 0), MODEL, "bf16", True, "FlashAttention 2, all documents in one call (--attention-backend flash2)"),
        (
            *("auto", (7, 5), MODEL, "bf16", False),
            "one document after another (--attention-backend auto: the device has compute capability 7.5, less than 8.0)",
        ),
        (
            *("flash", (9, 0), CAPPED, "bf16", False),
            "one document after another (--attention-backend flash: flash attention has no soft cap)",
        ),
        (
            *("auto", (9, 0), MODEL, "fp32", False),
            "one document after another (--attention-backend auto: flash attention computes in bf16, not in fp32)",
        ),
    ],
)
def test_the_choice_has_a_reason(word, capability, model, dtype, is_varlen, reason, monkeypatch):
    machine(monkeypatch, capability)
    chosen = choose_backend(word, model, dtype)
    assert (chosen.is_varlen, chosen.reason) == (is_varlen, f"attention: {reason}")


@pytest.mark.parametrize(
    ("word", "capability", "model", "reason"),
    [
        ("flash2", None, MODEL, "there is no CUDA device"),
        ("flash3", None, MODEL, "there is no CUDA device"),
        ("flash2", (9, 0), CAPPED, "flash attention has no soft cap"),
        ("flash3", (8, 0), MODEL, "FA3 is for compute capability 9, the device has 8.0"),
        ("flash3", (9, 0), MODEL, "flash_attn_interface is not installed"),
        ("flash4", (12, 0), MODEL, "FA4 is for compute capability 9 or 10, the device has 12.0"),
        ("flash4", (10, 0), MODEL, "flash_attn.cute is not installed"),
        ("flex", None, CAPPED, "there is no CUDA device"),
        ("flex", (9, 0), MODEL, "the model has no soft cap, which FlexAttention is for here"),
        ("cudnn", (9, 0), MODEL, "torch's attention over packed documents gives cuDNN no causal mask"),
    ],
)
def test_what_cannot_run_is_refused(word, capability, model, reason, monkeypatch):
    machine(monkeypatch, capability)
    with pytest.raises(ConfigError) as error:
        choose_backend(word, model, "bf16")
    expected = f"--attention-backend {word}: {reason}. Expected auto, which takes what there is. Pass it, or sdpa."
    assert error.value.problems == (expected,)


def test_torch_knows_the_names_that_are_activated():
    assert {name for name, _, _ in backend.PACKAGES.values()} <= set(torch.nn.attention.list_flash_attention_impls())
