"""conf/<org>/<model>.sh: flags that parse and values of the models' own config.json."""

import json
import subprocess
from pathlib import Path

import pytest

from megatron_sft.arguments import parse
from megatron_sft.checkpoint.conflicts import conflicts
from megatron_sft.checkpoint.hf_config import model_config_from_hf

ROOT = Path(__file__).parents[2]
CONFS = sorted((ROOT / "conf").glob("*/*.sh"))
CONFIGS = {path.stem.lower(): path for path in (ROOT / "tests" / "assets" / "hf_configs").rglob("*.json")}


def model_args(conf: Path) -> list[str]:
    script = 'source "$1"; printf "%s\\0" "${MODEL_ARGS[@]}"'
    done = subprocess.run(["bash", "-c", script, "_", str(conf)], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def hf_config(conf: Path) -> dict:
    found = [path for name, path in CONFIGS.items() if name.endswith(conf.stem.lower())]
    assert len(found) == 1, f"{conf}: expected its config.json in tests/assets/hf_configs, found {found}. Add it."
    return json.loads(found[0].read_text())


@pytest.mark.parametrize("conf", CONFS, ids=lambda path: path.stem)
def test_conf_agrees_with_the_models_config_json(conf):
    run, explicit = parse(model_args(conf), 1, training=False)
    assert conflicts(run.model, explicit, model_config_from_hf(hf_config(conf))) == []


@pytest.mark.parametrize("conf", CONFS, ids=lambda path: path.stem)
def test_default_checkpoint_is_the_model_that_the_conf_is_named_for(conf):
    assert f"HF_MODEL_CKPT:-{conf.parent.name}/{conf.stem}}}" in conf.read_text()
