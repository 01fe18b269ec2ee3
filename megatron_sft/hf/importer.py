"""Weights of an HF folder into the model: by our tables (families.py), or with nvidia-modelopt's importer (--importer modelopt).

modelopt reads what families.py lacks, and weights in FP8 blocks (DeepSeek-V3) and MXFP4 (gpt-oss), which it turns into bf16.
The architecture of a model that families.py lacks stands in the flags alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from megatron_sft.config.run import ModelConfig, RunConfig
from megatron_sft.errors import CheckpointError
from megatron_sft.hf.config import model_config_from_hf, read_hf_config, text_config
from megatron_sft.hf.families import FAMILIES
from megatron_sft.hf.weights import core_module, load_hf_weights
from megatron_sft.parallel import Ranks, agree

FAULTS = (LookupError, ValueError, RuntimeError, AttributeError, AssertionError, TypeError, OSError)
"""What modelopt raises on a model that it cannot read."""


def architecture_of(folder: str | Path, run: RunConfig) -> ModelConfig:
    """The architecture of an HF folder; run.model when modelopt reads it and families.py does not know its model_type."""
    if run.checkpoint.importer == "modelopt":
        return unquantised_architecture(folder, run.model)
    return model_config_from_hf(read_hf_config(folder), run.data.trust_remote_code)


def unquantised_architecture(folder: str | Path, flags: ModelConfig) -> ModelConfig:
    """That of the model which modelopt makes of perhaps quantised weights; `flags` for a model_type not in families.py."""
    hf = {key: value for key, value in read_hf_config(folder).items() if key != "quantization_config"}
    return model_config_from_hf(hf) if text_config(hf).get("model_type") in FAMILIES else flags


def load_weights(chunks: Sequence[nn.Module], run: RunConfig, folder: str | Path, ranks: Ranks) -> None:
    """Fills the model from an HF folder. All ranks call it.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        run: its `model` is the architecture that the chunks were built from; also says who imports.
        folder: HF folder with config.json and safetensors.
        ranks: this process's place.

    Raises:
        CheckpointError: on every rank, when the folder does not hold this model.
    """
    if run.checkpoint.importer == "builtin":
        load_hf_weights(chunks, run.model, folder, ranks)
    else:
        agree(lambda: _load_with_modelopt(chunks, run.model, Path(folder), run.data.trust_remote_code))


def _load_with_modelopt(chunks: Sequence[nn.Module], model: ModelConfig, folder: Path, trust_remote_code: bool) -> None:
    if model.padded_vocab_size not in (0, model.vocab_size):
        raise CheckpointError(
            f"{folder}: modelopt's importer cannot pad {model.vocab_size} tokens to {model.padded_vocab_size}; expected a "
            "vocabulary that the tensor-parallel ranks divide. Choose another --tensor-model-parallel-size, or leave "
            "--make-vocab-size-divisible-by and --importer out."
        )
    read = _modelopt_importer()
    for chunk in chunks:
        module = core_module(chunk)
        weights = dict(module.named_parameters())
        with torch.no_grad():
            for weight in weights.values():
                weight.fill_(float("nan"))
        dtype = next(iter(weights.values())).dtype
        try:
            read(module, str(folder), dtype=dtype, trust_remote_code=trust_remote_code, moe_router_dtype="fp32")
        except FAULTS as error:
            raise CheckpointError(
                f"{folder}: nvidia-modelopt could not import it ({type(error).__name__}: {error}); expected an "
                "architecture and tensors that it knows. Leave --importer out, or take another version of nvidia-modelopt."
            ) from None
        left = sorted(name for name, weight in weights.items() if bool(weight.isnan().any()))
        if left:
            raise CheckpointError(
                f"{folder}: nvidia-modelopt left {len(left)} parameters without values (first: {', '.join(left[:3])}); "
                "expected all of them. Correct the flags that describe the model, or leave --importer out."
            )


def _modelopt_importer() -> Callable[..., None]:
    try:
        from modelopt.torch.export import import_mcore_gpt_from_hf
    except ImportError as error:
        raise CheckpointError(
            f"--importer modelopt: nvidia-modelopt cannot be used ({error}); expected it in this environment. "
            "pip install nvidia-modelopt, or leave --importer out."
        ) from None
    return import_mcore_gpt_from_hf
