"""A trained model, ready to be asked: weights, tokenizer and ranks, from an HF folder or a Megatron checkpoint."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_sft import parallel
from megatron_sft.checkpoint.distributed import load_checkpoint
from megatron_sft.config.problems import problems
from megatron_sft.config.run import DataConfig, ModelConfig, RunConfig
from megatron_sft.data.chat import load_tokenizer
from megatron_sft.errors import ConfigError
from megatron_sft.hf.importer import load_weights
from megatron_sft.model.build import build_model
from megatron_sft.parallel import Ranks
from megatron_sft.weights import WeightSource, find_source, resolve_model


@dataclass(frozen=True)
class Inference:
    """What generation and tasks need."""

    chunk: Any
    """This rank's SFTModel, in eval mode."""
    model: ModelConfig
    tokenizer: Any
    tokenizer_folder: str
    ranks: Ranks


def load_for_inference(run: RunConfig, explicit: frozenset[str]) -> Inference:
    """Joins the ranks and loads --load. Collective.

    Args:
        run: flags; sequence, context and virtual pipeline parallelism, which do not pay here, are left out.
        explicit: ModelConfig fields that a flag set.
    """
    layout = dataclasses.replace(
        run.parallel, sequence_parallel=False, context_parallel_size=1, virtual_pipeline_model_parallel_size=None
    )
    checkpoint = dataclasses.replace(run.checkpoint, save=None, finetune=True)
    source = find_source(checkpoint, run.data.trust_remote_code)
    data = _tokenizer_config(run.data, source)
    size, remote = layout.tensor_model_parallel_size, data.trust_remote_code
    model = resolve_model(run.model, explicit, source, size, remote, checkpoint.importer)
    found = problems(dataclasses.replace(run, model=model, parallel=layout), parallel.process_environment()[1], training=False)
    if found:
        raise ConfigError(found)
    tokenizer = load_tokenizer(data)
    ranks = parallel.initialize(layout, run.train.seed)
    chunks = build_model(model, layout, run.train)
    if source.is_hf:
        load_weights(chunks, model, source.path, ranks, checkpoint.importer, remote)
    else:
        load_checkpoint(source.path, chunks, None, None, ranks, weights_only=True)
    return Inference(chunks[0].eval(), model, tokenizer, data.tokenizer_model, ranks)


def _tokenizer_config(data: DataConfig, source: WeightSource) -> DataConfig:
    """--tokenizer-model, else the HF folder's, else the one that the checkpoint was trained with."""
    if source.is_hf or data.tokenizer_model not in ("", source.path):
        return data
    stored = source.run_config.get("data", {})
    if not stored.get("tokenizer_model"):
        raise ConfigError(
            [
                f"{source.path}: does not name its tokenizer; expected it in run_config.json. "
                "Pass --tokenizer-model (an HF folder)."
            ]
        )
    template = data.chat_template or stored.get("chat_template")
    return dataclasses.replace(data, tokenizer_model=stored["tokenizer_model"], chat_template=template)
