"""Whether the model here computes what the HF checkpoint computes. The other side is always transformers' own code.

quick_check: in every conversion of finetune.py; settings, rotary frequencies and the first two layers.
first_difference: `megatron-sft verify`; all layers and the logits on one process, with adapters or without.
changed_tensors: `megatron-sft verify`; every tensor, written back and compared bit for bit.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_sft.config.run import ModelConfig
from megatron_sft.core_compat import device
from megatron_sft.errors import CheckpointError
from megatron_sft.hf.config import model_config_from_hf, read_hf_config
from megatron_sft.hf.conflicts import conflicts
from megatron_sft.hf.exporter import exported_tensors
from megatron_sft.hf.folder import open_file, stored_tensors
from megatron_sft.hf.importer import unquantised_architecture
from megatron_sft.hf.weights import core_module, first_not_finite
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks, agree, gather

THEIR_NAMES = {"kimi_k2": "deepseek_v3"}
"""A model_type that transformers knows under another name."""
QUICK_LAYERS = 2
PROBE_TOKENS = 48
UNROUNDED = "e_score_correction_bias"
"""The parameter that is fp32 here whatever the others are."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Largest relative error (2-norm) of a layer's output, by the dtype of the parameters."""


class _Reached(Exception):
    """Ends a forward pass behind the layer that was wanted."""


@contextmanager
def _recorded(module: Any, last: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """Collects the outputs of the embedding and of every layer; leaves the forward pass after layer `last`."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, ends: bool) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output).detach()
            if ends:
                raise _Reached

        return hook

    named = [(f"layer {layer.layer_number - 1}", layer) for layer in module.decoder.layers]
    handles = [layer.register_forward_hook(keep(name, n == last)) for n, (name, layer) in enumerate(named)]
    if module.pre_process:
        handles.append(module.embedding.register_forward_hook(keep("embedding", False)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _run(chunk: nn.Module, tokens: torch.Tensor, last: int | None) -> dict[str, torch.Tensor]:
    """Outputs [tokens, hidden] of embedding and layers of one chunk, and the logits if the forward pass is not cut."""
    from megatron.core.packed_seq_params import PackedSeqParams

    length = tokens.shape[1]
    ends = torch.tensor([0, length], dtype=torch.int32, device=tokens.device)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=length, max_seqlen_kv=length)
    training, module = chunk.training, core_module(chunk)
    chunk.eval()
    with torch.no_grad(), _recorded(module, last) as outputs:
        try:
            positions = torch.arange(length, device=tokens.device)[None]
            outputs["logits"] = chunk(tokens, positions, None, packed_seq_params=packed)[0]
        except _Reached:
            pass
    chunk.train(training)
    if "embedding" in outputs and getattr(module, "embedding_scale", None):
        outputs["embedding"] = outputs["embedding"] * module.embedding_scale
    return {name: value.reshape(-1, value.shape[-1]) for name, value in outputs.items()}


@contextmanager
def _in_fp32(module: Any, last: int) -> Iterator[None]:
    """Lets the layers up to `last` compute in fp32 with the values that they have, so that rounding hides nothing.

    In bf16 a router's bias or a sink that went missing is smaller than the error of a layer.
    """
    parameters = [parameter for layer in module.decoder.layers[: last + 1] for parameter in layer.parameters()]
    kept, dtype = [parameter.data for parameter in parameters], module.config.params_dtype
    hooks = [module.embedding.register_forward_hook(lambda *call: call[2].float())] if module.pre_process else []
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        module.config.params_dtype = torch.float32
        yield
    finally:
        module.config.params_dtype = dtype
        for hook in hooks:
            hook.remove()
        for parameter, data in zip(parameters, kept, strict=True):
            parameter.data = data


def _their_model(folder: Path, num_layers: int | None, dtype: torch.dtype) -> Any:
    """transformers' own class of the model, on the CPU, with all layers and a head or with the first layers alone.

    Code that came with the checkpoint is never run, even where config.json's auto_map names some.
    """
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    name = str(read_hf_config(folder).get("model_type"))
    kind = AutoModelForCausalLM if num_layers is None else AutoModel
    with _refusals_explained(folder):
        config: Any = CONFIG_MAPPING[THEIR_NAMES.get(name, name)].from_pretrained(str(folder))
    config.model_type = type(config).model_type  # transformers merges the experts' tensors by it
    if num_layers is not None:
        config.get_text_config().num_hidden_layers = num_layers
    if config.model_type == "nemotron_h":  # its layers are a list; steps have no lower limit where it was trained
        config.layers_block_type, config.time_step_min = config.layers_block_type[:num_layers], 1e-30
    settings: dict[str, Any] = dict(config=config, dtype=dtype, attn_implementation="eager", trust_remote_code=False)
    with _quiet_transformers(), _refusals_explained(folder):
        model = kind.from_pretrained(str(folder), **settings)
    return model.eval()


def _with_adapter(model: Any, folder: str) -> Any:
    """The model with the adapters that PEFT reads from a folder."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CheckpointError(
            f"{folder}: adapters are compared with PEFT, which cannot be used ({error}); expected it in this environment. "
            "pip install peft."
        ) from None
    return PeftModel.from_pretrained(model, folder).eval().get_base_model()


@contextmanager
def _refusals_explained(folder: Path) -> Iterator[None]:
    """What transformers raises on a folder or a config.json that its own classes do not take, around its reading calls alone."""
    from huggingface_hub.errors import StrictDataclassError

    refusals = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, ImportError)
    try:
        yield
    except refusals as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {error}); expected a model that it knows. Correct "
            "config.json, or go on without the comparison: --no-verify-conversion."
        ) from None


def _text_model(model: Any) -> tuple[Any, Any]:
    """(what takes tokens, what has embedding and layers) of transformers' model."""
    inner: Any = getattr(model, "language_model", None)
    model = inner if hasattr(inner, "lm_head") else model  # Llama 4's wrapper fails on text alone in transformers 5.24
    body = getattr(model, "language_model", model)
    body = body if hasattr(body, "layers") else body.model
    return model, getattr(body, "language_model", body)


def _reference(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from transformers' model, on the CPU; logits where it has a head."""
    model, body = _text_model(model)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    handles = [body.get_input_embeddings().register_forward_hook(keep("embedding"))]
    handles += [layer.register_forward_hook(keep(f"layer {number}")) for number, layer in enumerate(body.layers)]
    with torch.no_grad():
        result = model(tokens.cpu(), use_cache=False)
    for handle in handles:
        handle.remove()
    if hasattr(result, "logits"):
        outputs["logits"] = result.logits
    return {name: value.reshape(-1, value.shape[-1]) for name, value in outputs.items()}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hides the progress bar and the list of layers that were left out on purpose."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def _probe_tokens(model: ModelConfig) -> torch.Tensor:
    """Ids spread over the vocabulary, [1, length] int64; a text is not needed to see a difference."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(min(model.vocab_size, 2**31), (1, PROBE_TOKENS), generator=generator).to(device())


def first_difference(
    chunk: nn.Module, folder: str | Path, tokens: torch.Tensor | None = None, adapter: str | None = None
) -> tuple[str | None, float]:
    """Runs the whole model on one process beside transformers.

    Args:
        chunk: the model, fp32, not cut over ranks.
        folder: the HF folder.
        tokens: ids [1, n]; None: random ones.
        adapter: PEFT folder of the model's adapters, which the other side gets from PEFT.

    Returns:
        (name of the first place whose output differs, or None; largest absolute difference of the logits).
    """
    module = core_module(chunk)
    model = model_config_from_hf(read_hf_config(folder))
    tokens = _probe_tokens(model) if tokens is None else tokens
    their_model = _their_model(Path(folder), None, torch.float32)
    if adapter is not None:
        their_model = _with_adapter(their_model, adapter)
    theirs, body = _reference(their_model, tokens), _text_model(their_model)[1]
    ours = _run(chunk, tokens, None)
    ours["logits"] = ours["logits"][:, : model.vocab_size]
    tolerance = TOLERANCE[next(module.parameters()).dtype]
    places = [name for name in theirs if name in ours]
    odd = next((name for name in places if not _relative_error(ours[name], theirs[name]) <= tolerance), None)
    faults = _rotary_faults(module, body)
    difference = float((ours["logits"].float().cpu() - theirs["logits"]).abs().max())
    return (faults[0] if odd is None and faults else odd), difference


def reference_losses(folder: Path, documents: Sequence[tuple[Any, Any]]) -> list[float]:
    """transformers' mean loss over the trained tokens of each document, alone, in fp32 on the CPU.

    Args:
        folder: the HF folder.
        documents: (tokens [n], mask [n], above 0 where token i itself is trained); each trains a token behind its first.
    """
    model = _text_model(_their_model(folder, None, torch.float32))[0]
    losses = []
    for tokens, mask in documents:
        ids, trained = torch.as_tensor(tokens).long(), torch.as_tensor(mask)[1:] > 0
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(float(nn.functional.cross_entropy(logits[trained], ids[1:][trained])))
    return losses


def _rotary_faults(module: Any, body: Any) -> list[str]:
    """Compares the rotary frequencies where both sides keep one table."""
    table = getattr(module, "rotary_table", None)
    ours = None if table is None else table.inverse_frequencies(PROBE_TOKENS)[0][0]
    theirs = getattr(getattr(body, "rotary_emb", None), "inv_freq", None)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return []
    error = float((ours.float().cpu() / theirs.float().cpu() - 1).abs().max())
    return [f"rotary frequencies (theta or scaling; largest relative error {error:.1e})"] if error > 1e-5 else []


def _setting_faults(module: Any, model: ModelConfig, hf: ModelConfig) -> list[str]:
    """What the built modules say against config.json: the run's settings, and the epsilon of every norm."""
    faults = conflicts(model, frozenset(ModelConfig.__dataclass_fields__) | model.core_fields().keys(), hf)
    for name, part in module.named_modules():
        epsilon = getattr(part, "eps", getattr(part, "variance_epsilon", None))
        if isinstance(epsilon, float) and abs(epsilon - hf.norm_epsilon) > 1e-12:
            faults.append(f"{name} has epsilon {epsilon}, config.json says {hf.norm_epsilon}")
            break
    return faults


def _refuse_infinite(chunks: Sequence[nn.Module], folder: str | Path) -> None:
    if name := first_not_finite(chunks):
        raise CheckpointError(
            f"{folder}: {name} holds NaN or infinite values; expected numbers. Download the folder again, or take an earlier "
            "checkpoint; --no-verify-conversion trains on regardless."
        )


def quick_check(chunks: Sequence[nn.Module], model: ModelConfig, folder: str | Path, ranks: Ranks) -> None:
    """Compares a freshly converted model with the first layers of transformers'. All ranks call it.

    The first pipeline stage runs two layers on 48 tokens, in its own dtype and in fp32; its tensor rank 0 of the first
    replica does the same with transformers' on the CPU. Costs seconds, and memory for the embeddings and two layers in fp32.

    Raises:
        CheckpointError: on every rank, naming the first thing that differs.
    """
    module = core_module(chunks[0])
    faults = _setting_faults(module, model, unquantised_architecture(folder, model))
    agree(lambda: _refuse_infinite(chunks, folder))
    if read_hf_config(folder).get("quantization_config"):
        logger.info("layers not compared with transformers, which needs GPU kernels for quantised weights")
    elif ranks.is_first_stage and ranks.cp_size == 1 and not faults:
        last = min(QUICK_LAYERS, len(module.decoder.layers)) - 1
        faults = _first_layer_faults(chunks[0], model, Path(folder), last, ranks.tp_rank == ranks.dp_rank == 0)
    faults = next((theirs for theirs in gather(faults) if theirs), [])
    if faults:
        raise CheckpointError(
            f"{folder}: converted weights do not compute what transformers computes: {faults[0]}; expected the same. "
            "Report it; --no-verify-conversion trains on regardless."
        )
    logger.info("conversion checked against transformers: settings, rotary frequencies, first layers")


def _first_layer_faults(chunk: nn.Module, model: ModelConfig, folder: Path, last: int, compares: bool) -> list[str]:
    """What differs in the layers up to `last`, in fp32 and in the dtype of training.

    Args:
        chunk: the first of the first stage.
        model: the architecture.
        folder: the HF folder.
        last: number of a layer.
        compares: this rank is the one that runs transformers.
    """
    module, tokens = core_module(chunk), _probe_tokens(model)
    dtype = next(module.parameters()).dtype
    rounded = _run(chunk, tokens, last)
    with _in_fp32(module, last):
        exact = _run(chunk, tokens, last)
    if not compares:
        return []
    their_model = _their_model(folder, last + 1, torch.float32)
    for name, parameter in their_model.named_parameters():
        if not name.endswith(UNROUNDED):
            parameter.data = parameter.data.to(dtype).float()
    theirs = _reference(their_model, tokens)
    their_rounded = theirs if dtype == torch.float32 else _reference(_their_model(folder, last + 1, dtype), tokens)
    faults = _rotary_faults(module, _text_model(their_model)[1])
    faults += _layer_faults(exact, theirs, theirs, TOLERANCE[torch.float32])
    return faults + _layer_faults(rounded, theirs, their_rounded, TOLERANCE[dtype])


def _layer_faults(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rounded: dict[str, torch.Tensor], tolerance: float
) -> list[str]:
    """The first output that differs. With sequence parallelism a rank has the first rows only.

    Args:
        ours: by name.
        theirs: transformers' in fp32, with the weights that we have.
        rounded: transformers' in the dtype of `ours`; three times its own distance from fp32 is rounding, not a mistake.
        tolerance: relative error that is always allowed.
    """
    for name, value in ours.items():
        expected = theirs[name][: value.shape[0]]
        allowed = max(tolerance, 3 * _relative_error(rounded[name][: value.shape[0]], expected))
        error = _relative_error(value, expected)
        if not error <= allowed:
            return [f"the output of {name} differs (relative error {error:.1e}, at most {allowed:.0e} expected)"]
    return []


class Changed(NamedTuple):
    """A tensor that is not the folder's."""

    name: str
    ours: str
    """checksum, and so is"""
    theirs: str
    is_rounded: bool
    """It is the folder's, rounded to bf16."""


def changed_tensors(chunks: Sequence[nn.Module], model: ModelConfig, folder: str | Path, ranks: Ranks) -> list[Changed]:
    """Writes every HF tensor back in memory and compares it with the folder's. All ranks call it.

    Returns:
        On rank 0 every tensor that differs; elsewhere nothing.
    """
    stored, changed = stored_tensors(folder), []
    for name, tensor in exported_tensors(chunks, model, folder, ranks):
        with open_file(stored[name].file) as file:
            theirs = file.get_tensor(stored[name].name)
            if not torch.equal(_bytes(tensor), _bytes(theirs)):
                is_rounded = torch.equal(_bytes(tensor), _bytes(theirs.bfloat16().to(theirs.dtype)))
                changed.append(Changed(name, checksum(tensor), checksum(theirs), is_rounded))
    return changed


def rounded_tensors(folder: str | Path) -> int:
    """How many tensors of a folder lose digits as bf16: those of more precision, by the files' headers."""
    return sum(tensor.dtype != torch.bfloat16 and UNROUNDED not in name for name, tensor in stored_tensors(folder).items())


def checksum(tensor: torch.Tensor) -> str:
    """sha256 of the tensor's bytes in row order, the first 16 digits."""
    return hashlib.sha256(_bytes(tensor).numpy().tobytes()).hexdigest()[:16]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in row order [n] uint8; as numbers a NaN would differ from itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
