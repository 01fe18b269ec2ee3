"""Parts of an architecture: megatron-core's names and defaults, each in one place, also from what older releases wrote."""

import dataclasses
import json

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_sft.config.arguments import parse
from megatron_sft.config.core_fields import RECORD_OF, RECORDS
from megatron_sft.config.run import OWN_CORE, ModelConfig, RunConfig, model_config_from_json
from megatron_sft.errors import CheckpointError

OURS = {"q_lora_rank": None, "multi_latent_attention": False}
"""Megatron-LM's: without the flag queries are not compressed; MLATransformerConfig is taken only where it is asked for."""
EXPERTS = {"num_moe_experts": 8, "moe_layer_freq": [0, 1], "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01}
LATENT = {"multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 16, "rope_type": "rope"}
HYBRID = {"hybrid_layer_pattern": "M*", "mamba_num_heads": 4}
OWN = {"no_rope_freq": [0, 1], "softmax_scale": 0.5, "rotary_interleaved": True}


def test_defaults_are_megatron_cores():
    theirs = {field.name: field.default for field in dataclasses.fields(MLATransformerConfig)}
    ours = {field.name: field.default for kind in RECORDS.values() for field in dataclasses.fields(kind)}
    ours |= {name: getattr(ModelConfig(), name) for name in OWN_CORE}
    del ours["hybrid_layer_pattern"]  # Megatron-LM's flag
    assert {name: OURS.get(name, theirs[name]) for name in ours} == ours


def test_no_name_stands_in_two_places():
    plain = {field.name for field in dataclasses.fields(ModelConfig)}
    assert not plain & RECORD_OF.keys()
    assert len(RECORD_OF) == sum(len(dataclasses.fields(kind)) for kind in RECORDS.values())


@pytest.mark.parametrize("core", [{}, EXPERTS, LATENT, HYBRID, OWN, {**EXPERTS, **LATENT, **HYBRID, **OWN, "qk_l2_norm": True}])
def test_names_come_back_from_their_places(core):
    model = ModelConfig(num_layers=2).with_core(core)
    assert core.items() <= model.core_fields().items()
    assert ModelConfig(num_layers=2).with_core(model.core_fields()) == model
    assert model_config_from_json(json.loads(json.dumps(dataclasses.asdict(model)))) == model


def test_a_part_that_a_model_has_not_is_not_passed_on():
    assert ModelConfig().core_fields() == {}
    assert ModelConfig().with_core({"moe_router_topk": 4, "v_head_dim": 128}).core_fields() == {"moe_router_topk": 4}


def test_run_config_of_a_release_without_records_is_read():
    """As 0.1.0 wrote it: all names of megatron-core in `core`, some of them None."""
    core = {**EXPERTS, **LATENT, **OWN, "moe_latent_size": None, "moe_router_num_groups": None}
    written = json.loads(RunConfig(model=ModelConfig(num_layers=2, window_layers=(True, False))).to_json())["model"]
    for name in (*RECORDS, *OWN_CORE):
        del written[name]
    model = model_config_from_json({**written, "core": core})
    assert (model.moe.num_moe_experts, model.moe.moe_layer_freq, model.moe.moe_latent_size) == (8, [0, 1], None)
    assert model.mla.multi_latent_attention and model.mla.q_lora_rank is None and model.mla.kv_lora_rank == 16
    assert (model.no_rope_freq, model.softmax_scale, model.rotary_interleaved) == ([0, 1], 0.5, True)
    assert model.core == {"moe_aux_loss_coeff": 0.01} and model.window_layers == (True, False)


@pytest.mark.parametrize(("unknown", "value"), [("later", 1), ("moe", {"num_moe_experts": 4, "moe_later": 2})])
def test_settings_of_a_later_release_are_refused(unknown, value):
    with pytest.raises(CheckpointError, match=r"unknown model settings (later|moe_later); expected those of this release"):
        model_config_from_json({"num_layers": 2, unknown: value})


def test_flags_keep_their_spelling_and_find_their_place():
    given = "--num-experts 8 --moe-router-topk 4 --moe-layer-freq [0]+[1]*3 --multi-latent-attention --kv-lora-rank 16"
    given += " --no-rope-freq [0,1]*2 --softmax-scale 0.5 --rotary-interleaved --moe-aux-loss-coeff 0.01 --num-layers 4"
    run, explicit = parse(given.split(), 1, training=False)
    assert (run.model.moe.num_moe_experts, run.model.moe.moe_router_topk, run.model.moe.moe_layer_freq) == (8, 4, [0, 1, 1, 1])
    assert (run.model.mla.kv_lora_rank, run.model.mla.q_lora_rank) == (16, None)
    assert (run.model.no_rope_freq, run.model.softmax_scale, run.model.rotary_interleaved) == ([0, 1, 0, 1], 0.5, True)
    assert run.model.core == {"moe_aux_loss_coeff": 0.01}
    records = {"num_moe_experts", "moe_router_topk", "moe_layer_freq", "multi_latent_attention", "kv_lora_rank"}
    assert explicit == records | {"num_layers", "no_rope_freq", "softmax_scale", "rotary_interleaved", "moe_aux_loss_coeff"}
