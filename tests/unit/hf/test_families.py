"""Every family's table covers what transformers stores, and its config.json survives both ways."""

import math
import re

import pytest

from megatron_sft.hf.config import hf_config_from_model, model_config_from_hf, read_hf_config
from megatron_sft.hf.derived import DERIVED
from megatron_sft.hf.families import FAMILIES
from megatron_sft.hf.folder import stored_tensors
from megatron_sft.hf.layout import LAYOUTS
from megatron_sft.model.rope import RotaryTable
from tests.unit.hf.tiny_models import KEYS, LONG_ROPE, SIZES, tiny_folder


@pytest.mark.parametrize("name", KEYS)
def test_table_covers_every_stored_tensor(name, tmp_path):
    tiny_folder(name, tmp_path)
    family = FAMILIES[KEYS[name]["model_type"]]
    known = {source for rule in family.tensors.values() for source in rule[1:]}
    stored = {
        re.sub(r"experts\.\d+\.", "experts.{expert}.", re.sub(r"layers\.\d+\.", "layers.{layer}.", name))
        for name in stored_tensors(tmp_path)
    }
    assert stored - known == set()


@pytest.mark.parametrize("name", KEYS)
def test_config_survives_both_ways(name, tmp_path):
    tiny_folder(name, tmp_path)
    hf = read_hf_config(tmp_path)
    model = model_config_from_hf(hf)
    assert model_config_from_hf(hf_config_from_model(model, None)) == model
    assert model_config_from_hf(hf_config_from_model(model, hf)) == model


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_original_length_of_phi3_stands_beside_its_scaling(kind):
    """As in the config.json of Phi-3-mini-128k-instruct and Phi-4-mini-instruct."""
    keys = {**SIZES, **KEYS["phi3"], "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    model = model_config_from_hf({**keys, "rope_scaling": {**LONG_ROPE, "type": kind}})
    assert model.rope_scaling["rope_type"] == "longrope"
    assert RotaryTable(model).original_positions == 4096
    _, factor = RotaryTable(model).inverse_frequencies(1)[0]
    assert factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_tables_name_existing_layouts_and_functions():
    for family in FAMILIES.values():
        assert {rule[0] for rule in family.tensors.values()} <= LAYOUTS.keys()
        assert set(family.derived) <= DERIVED.keys()
