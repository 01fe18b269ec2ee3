"""The architecture of a run: config.json's, or that of the flags alone; the vocabulary's rows."""

import dataclasses
import json

import pytest

from megatron_sft.config.arguments import parse
from megatron_sft.config.run import ParallelConfig
from megatron_sft.weights import WeightSource, resolve_model
from tests.unit.hf.test_config import LLAMA_3_2

FLAGS = "--num-layers 16 --hidden-size 2048 --num-attention-heads 32 --num-query-groups 8".split()


def at_tp2(run):
    return dataclasses.replace(run, parallel=ParallelConfig(tensor_model_parallel_size=2))


@pytest.mark.parametrize(
    "vocab_size, flags, rows",
    [
        (128256, [], 128256),
        (128256, ["--make-vocab-size-divisible-by", "128"], 128256),
        (128256, ["--padded-vocab-size", "128512"], 128512),
        (128259, ["--padded-vocab-size", "128256"], 128260),  # tokens were added to the model after the conf was written
    ],
)
def test_embedding_holds_every_token_of_config_json(tmp_path, vocab_size, flags, rows):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_2, "vocab_size": vocab_size}))
    run, explicit = parse([*FLAGS, *flags], 1, training=False)
    model = resolve_model(at_tp2(run), explicit, WeightSource(str(tmp_path), True, False, {}))
    assert (model.vocab_size, model.padded_vocab_size) == (vocab_size, rows)


def test_flags_alone_count_every_row_as_a_token():
    run, explicit = parse([*FLAGS, "--padded-vocab-size", "128256"], 1, training=False)
    model = resolve_model(at_tp2(run), explicit, WeightSource("megatron", False, False, {}))
    assert (model.vocab_size, model.padded_vocab_size, model.num_layers) == (128256, 128256, 16)
