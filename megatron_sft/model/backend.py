"""Which attention kernels a model takes, asked once where it is built: the choice, its reason, and what cannot run refused.

Kernels: flash attention over all documents of a row in one call (torch's own FlashAttention 2, or 3 and 4 where their packages
are installed, which torch then calls in its place), one document after another (attention.py), or, for soft caps, FlexAttention
(flex.py).
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_sft.config.run import ModelConfig
from megatron_sft.core_compat import triton_lacks
from megatron_sft.errors import ConfigError

PACKAGES: Mapping[str, tuple[str, str, tuple[int, ...]]] = {
    "flash3": ("FA3", "flash_attn_interface", (9,)),
    "flash4": ("FA4", "flash_attn.cute", (9, 10)),
}
"""Word -> torch's name, the module with the kernels, and the major compute capabilities that they are for.

torch 2.13, torch/nn/attention/_fa3.py and _fa4.py.
"""
OTHERS = ("fused", "unfused", "local")
"""Megatron's words for kernels that are not here: as auto."""


@dataclass(frozen=True)
class Backend:
    """What attention is computed by."""

    is_varlen: bool
    """Flash attention over all documents in one call, for heads that fit (attention.py:fits_flash)."""
    is_flex: bool
    """Soft caps by FlexAttention (flex.py)."""
    reason: str
    """For the log: the kernels, and why they."""


def choose_backend(word: str, model: ModelConfig, dtype: str) -> Backend:
    """The kernels of a model; FlashAttention 3 and 4 take the place of 2 in the whole process.

    Args:
        word: --attention-backend.
        model: soft caps are for documents one after another.
        dtype: fp32 or bf16.

    Raises:
        ConfigError: the kernels that are asked for cannot run here, or not for this model.
    """
    if word in ("auto", "flash", *OTHERS):
        return _chosen(word, _lacks_flash(model, dtype))
    if word == "sdpa":
        return Backend(False, False, "attention: one document after another (--attention-backend sdpa)")
    lacks = _lacks_cudnn() if word == "cudnn" else _lacks_flex(model) if word == "flex" else ""
    if word.startswith("flash"):
        lacks = _lacks_flash(model, dtype) or _lacks_package(word)
    if lacks:
        raise ConfigError([f"--attention-backend {word}: {lacks}. Expected auto, which takes what there is. Pass it, or sdpa."])
    if word == "flex":
        return Backend(False, True, "attention: soft caps by FlexAttention, a row at a time (--attention-backend flex)")
    if word in PACKAGES:
        torch.nn.attention.activate_flash_attention_impl(PACKAGES[word][0])  # type: ignore[attr-defined]
    return Backend(True, False, f"attention: FlashAttention {word[-1]}, all documents in one call (--attention-backend {word})")


def _chosen(word: str, lacks: str) -> Backend:
    asked = f"--attention-backend {word}"
    if lacks:
        return Backend(False, False, f"attention: one document after another ({asked}: {lacks})")
    others = [name for name in PACKAGES if not _lacks_package(name)]
    more = f"; --attention-backend {' or '.join(others)} can run too" if others else ""
    return Backend(True, False, f"attention: torch's FlashAttention 2, all documents in one call ({asked}{more})")


def _lacks_flash(model: ModelConfig, dtype: str) -> str:
    """What keeps flash attention from running; "": nothing."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"the device has compute capability {major}.{minor}, less than 8.0"
    if dtype != "bf16":
        return f"flash attention computes in bf16, not in {dtype}"
    return "flash attention has no soft cap" if model.attn_logit_softcapping is not None else ""


def _lacks_package(word: str) -> str:
    """What keeps FlashAttention 3 or 4 from running on a device that has torch's; "": nothing."""
    if word not in PACKAGES:
        return ""
    name, module, majors = PACKAGES[word]
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"torch {torch.__version__} cannot be told to call {name}"
    major, minor = torch.cuda.get_device_capability()
    if major not in majors:
        return f"{name} is for compute capability {' or '.join(map(str, majors))}, the device has {major}.{minor}"
    package = module.partition(".")[0]
    missing = importlib.util.find_spec(package) is None or importlib.util.find_spec(module) is None
    return f"{module} is not installed" if missing else ""


def _lacks_flex(model: ModelConfig) -> str:
    """What keeps FlexAttention from being compiled, or from being of use."""
    if model.attn_logit_softcapping is None:
        return "the model has no soft cap, which FlexAttention is for here"
    return triton_lacks() if torch.cuda.is_available() else "there is no CUDA device"


def _lacks_cudnn() -> str:
    """torch 2.13, torch/nn/attention/varlen.py:_varlen_attn: cuDNN is refused with any window, and causal is one."""
    return "torch's attention over packed documents gives cuDNN no causal mask"
