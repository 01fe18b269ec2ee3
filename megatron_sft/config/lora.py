"""What adapters are, as flags. A section of RunConfig (run.py); what contradicts what stands in adapters.py."""

from dataclasses import dataclass
from typing import Annotated

from megatron_sft.config.fields import Number, Words


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): which weights have one, and how large. Everything else is then frozen."""

    lora_rank: Annotated[int, Number(0, 2**14)] = 0
    """Rank of the adapters; 0: none, all weights are trained."""
    lora_alpha: Annotated[float, Number(1e-6, 1e6)] | None = None
    """An adapter's output is multiplied by alpha / rank (rslora: alpha / sqrt(rank)); None: twice the rank."""
    lora_dropout: Annotated[float, Number(0, 0.999)] = 0.0
    """Of the adapters' input."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """all-linear, ends of Hugging Face module names (q_proj down_proj), Megatron's (linear_qkv), or regular expressions."""
    lora_type: Annotated[str, Words("lora", "rslora", "dora")] = "lora"
    """lora, rslora (arXiv 2312.03732) or dora (arXiv 2402.09353)."""
    lora_init: Annotated[str, Words("kaiming", "gaussian", "xavier")] = "kaiming"
    """Of the first factor (kaiming: uniform, as PEFT draws it; gaussian: deviation 1 / rank); the second is zero."""
    lora_load: str | None = None
    """PEFT folder or adapter checkpoint that is gone on with, or used."""
    lora_merge: bool = False
    """--save-hf writes a plain HF folder, the adapters added to its weights, in place of a PEFT folder."""

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.lora_rank

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / (self.lora_rank**0.5 if self.lora_type == "rslora" else self.lora_rank)
