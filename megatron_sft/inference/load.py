"""A trained model, ready to be asked: weights, tokenizer and ranks, from an HF folder or a Megatron checkpoint."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sft import hub, parallel
from megatron_sft.config.run import DataConfig, ModelConfig, RunConfig
from megatron_sft.core_compat import multiplies_bf16
from megatron_sft.data.chat import load_tokenizer
from megatron_sft.errors import ConfigError
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks
from megatron_sft.weights import WeightSource, build, resolve


@dataclass(frozen=True)
class Inference:
    """What generation and tasks need."""

    chunks: Sequence[Any]
    """This rank's SFTModels, one or one a virtual pipeline stage; in training wrapped in DDP."""
    model: ModelConfig
    tokenizer: Any
    tokenizer_folder: str
    ranks: Ranks

    def decode(self, tokens: list[int]) -> str:
        """The text with all special tokens, in which stop strings are looked for."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))


def load_for_inference(run: RunConfig, explicit: frozenset[str]) -> Inference:
    """Joins the ranks and loads --load. Collective.

    Args:
        run: flags; any layout that trains also generates. A CPU without bf16 arithmetic computes in fp32 with the bf16 weights.
        explicit: ModelConfig fields that a flag set.
    """
    if run.train.params_dtype == "bf16" and not multiplies_bf16():
        logger.info("this CPU has no bf16 arithmetic: the weights are computed with in fp32, which is faster.")
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, params_dtype="fp32"))
    checkpoint = dataclasses.replace(run.checkpoint, verify_conversion=False)
    run, source = resolve(dataclasses.replace(run, checkpoint=checkpoint), explicit, training=False)
    data = _tokenizer_config(run.data, source)
    tokenizer = load_tokenizer(data)
    ranks = parallel.initialize(run.parallel, run.train.seed)
    chunks = [chunk.eval() for chunk in build(run, source, ranks)]
    return Inference(chunks, run.model, tokenizer, data.tokenizer_model, ranks)


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
    tokenizer = hub.folder("--tokenizer-model", stored["tokenizer_model"], weights=False)
    return dataclasses.replace(data, tokenizer_model=tokenizer, chat_template=template)
