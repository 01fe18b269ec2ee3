"""Every conf/<org>/<model>.sh: it says all that the model's own config.json says, in the words of `megatron-sft conf`; the
model has transformers' number of parameters; and the layout in its comment fits.
"""

import dataclasses
import functools
import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_sft.config.arguments import parse, read_flags
from megatron_sft.config.problems import problems
from megatron_sft.config.run import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.hf.conf import conf_text
from megatron_sft.hf.config import model_config_from_hf, text_config
from megatron_sft.hf.conflicts import ARCHITECTURE, conflicts
from megatron_sft.model.pattern import layers_with_experts
from megatron_sft.parallel import finalize, initialize
from tests.unit.hf.tiny_models import KEYS, SIZES

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "tests" / "assets" / "hf_configs"
CONFS = {str(path.relative_to(ROOT / "conf").with_suffix("")): path for path in sorted((ROOT / "conf").glob("*/*.sh"))}
DUMP = 'for f; do (source "$f"; printf "%s\\0" "$f" "$HF_MODEL_CKPT" "${#MODEL_ARGS[@]}" "${MODEL_ARGS[@]}"); done'
LAUNCH = re.compile(r"^# (\d+) GPUs? of 80 GB: ((?:\w+=\d+ )+)\./finetune\.sh (\S+)$(?:\n# with MLM_EXTRA_ARGS='(.*)'$)?", re.M)
STATES_GB = 62
"""Weights, gradients and Adam states of one GPU; the rest of its 80 GB is for activations."""
TRAINING = {"moe_router_dtype", "moe_token_dispatcher_type", "moe_router_load_balancing_type", "moe_aux_loss_coeff"}
"""Entries of ModelConfig.core that a conf adds for training."""


@functools.cache
def shell_values() -> dict[str, tuple[str, list[str]]]:
    """Of every conf HF_MODEL_CKPT and MODEL_ARGS, as one bash process sees them."""
    command = ["bash", "-euc", DUMP, "_", *map(str, CONFS.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    words = iter(done.stdout.split("\0")[:-1])
    names = {str(path): name for name, path in CONFS.items()}
    return {names[path]: (next(words), [next(words) for _ in range(int(next(words)))]) for path in words}


def hf_config(name: str) -> dict[str, Any]:
    path = CONFIGS / (name.replace("/", "__") + ".json")
    assert path.exists(), f"conf/{name}.sh: expected its config.json at {path}. Add it."
    return json.loads(path.read_text())


@functools.cache
def flags_of(name: str) -> tuple[ModelConfig, frozenset[str]]:
    run, explicit = parse(shell_values()[name][1], 1, training=False)
    return run.model, explicit


def plain(model: ModelConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """The fields that a conf can say, and entries of core that are no training and not megatron-core's defaults."""
    core = {name: value for name, value in model.core.items() if name not in TRAINING and value not in (None, False)}
    model = model.with_core({"moe_layer_freq": layers_with_experts(model)})
    free = {"vocab_size": 0, "padded_vocab_size": model.padded_vocab_size or model.vocab_size, "init_method_std": 0.0}
    return dataclasses.replace(model, core={}, **free), core


@pytest.mark.parametrize("name", CONFS)
def test_conf_says_what_config_json_says(name):
    model, explicit = flags_of(name)
    theirs = model_config_from_hf(hf_config(name))
    assert plain(model) == plain(theirs)
    assert conflicts(model, explicit, theirs) == []
    assert model.core.keys() - TRAINING <= ARCHITECTURE, "core_fields.CoreArchitecture does not know it"


@pytest.mark.parametrize("name", CONFS)
def test_conf_is_what_the_command_writes(name):
    text = CONFS[name].read_text()
    written = conf_text(model_config_from_hf(hf_config(name)), name)
    if "\nsource " not in text:
        assert [line for line in text.split("\n") if line[:2] != "# " or "shellcheck" in line or "values of" in line] == (
            written.split("\n")
        )
    else:  # another conf and what differs: the same run
        assert parse(flags_in(written), 1, training=False) == parse(shell_values()[name][1], 1, training=False)


HOSTILE = [
    "m$(touch {0})",
    "`touch {0}`",
    "x; touch {0}",
    "x\ntouch {0}\n",
    "'; touch {0}; '",
    '"; touch {0}; "',
    "}}; touch {0}; {{",
    "${{x:-$(touch {0})}}",
    "\\",
    "~",
    "*",
    "-n",
    "caf\u00e9 \u2028",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_sourcing_a_conf_runs_nothing_that_a_folder_or_its_config_says(text, tmp_path):
    """As the name of the folder, and as every text and number of a config.json that reaches the conf."""
    marker = tmp_path / "marker"
    text = text.format(marker)
    model = ModelConfig(
        normalization=text,
        activation=text,
        position_embedding_type=text,
        vocab_size=text,
    ).with_core({"num_moe_experts": 4, "moe_router_score_function": text})  # type: ignore[arg-type]
    model = dataclasses.replace(model, rope_scaling={"rope_type": text, "factor": text}, rotary_base=text)  # type: ignore[arg-type]
    conf = tmp_path / "conf.sh"
    conf.write_text(conf_text(model, text))
    script = 'source "$1"; printf "%s\\0" "$HF_MODEL_CKPT" "${MODEL_ARGS[@]}"'
    done = subprocess.run(["bash", "-euc", script, "_", conf], capture_output=True, text=True, check=True, cwd=tmp_path)
    words = done.stdout.split("\0")[:-1]
    assert words[0] == text and words[words.index("--normalization") + 1] == text
    assert words[words.index("--padded-vocab-size") + 1] == text
    assert not marker.exists() and done.stderr == ""


def flags_in(text: str) -> list[str]:
    return shlex.split(text[text.index("MODEL_ARGS=(") + 12 : text.rindex(")")])


@pytest.mark.parametrize("name", KEYS)
def test_command_says_every_feature_of_a_family(name):
    from transformers import AutoConfig

    theirs = model_config_from_hf(AutoConfig.for_model(**{**SIZES, **KEYS[name]}).to_dict())
    assert plain(parse(flags_in(conf_text(theirs, name)), 1, training=False)[0].model) == plain(theirs)


@pytest.mark.parametrize("name", CONFS)
def test_default_checkpoint_is_the_model_that_the_conf_is_named_for(name):
    assert shell_values()[name][0] == name


@functools.cache
def their_parameters(name: str) -> tuple[int, int]:
    """Parameters of transformers' model beside the routed experts, and of these."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = dict(text_config(hf_config(name)))
    if keys["model_type"] == "kimi_k2":  # DeepSeek-V3's class under a name of its own
        keys["model_type"] = "deepseek_v3"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    return sum(sizes.values()) - experts, experts


@pytest.fixture(scope="module")
def world():
    yield initialize(ParallelConfig(), 1)
    finalize()


class Counts(NamedTuple):
    layers: list[int]
    rest: int


def built(model: ModelConfig) -> Counts:
    """Parameters of each layer and of all else, of the model on the meta device."""
    from megatron_sft.model.build import build_model

    with torch.device("meta"):
        (chunk,) = build_model(model, ParallelConfig(), TrainConfig(params_dtype="bf16"))
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in chunk.decoder.layers]
    return Counts(layers, sum(parameter.numel() for parameter in chunk.parameters()) - sum(layers))


def layer_kinds(model: ModelConfig) -> Sequence[Any]:
    """Of each layer its letter in a hybrid pattern, or whether it has experts."""
    return model.mamba.hybrid_layer_pattern or [int(experts) for experts in layers_with_experts(model)]


def one_of_each_layer(model: ModelConfig) -> ModelConfig:
    """The model with one layer of each kind, in the order of sorted(set(layer_kinds))."""
    kinds = sorted(set(layer_kinds(model)))
    core = {"moe_layer_freq": [int(kind in (1, "E")) for kind in kinds], "no_rope_freq": None}
    if model.mamba.hybrid_layer_pattern:
        core["hybrid_layer_pattern"] = "".join(kinds)
    return dataclasses.replace(model.with_core(core), num_layers=len(kinds), window_layers=())


def our_parameters(model: ModelConfig) -> int:
    """Of models with experts one layer of each kind is built, because thousands of them take seconds."""
    if not model.moe.num_moe_experts:
        counts = built(model)
        return sum(counts.layers) + counts.rest
    counts, layers = built(one_of_each_layer(model)), layer_kinds(model)
    kinds = sorted(set(layers))
    return counts.rest + sum(size * layers.count(kind) for kind, size in zip(kinds, counts.layers, strict=True))


@pytest.mark.parametrize("name", CONFS)
def test_model_of_the_flags_alone_has_transformers_parameters(name, world):
    assert our_parameters(flags_of(name)[0]) == sum(their_parameters(name))


def tiny(model: ModelConfig) -> ModelConfig:
    """One layer of each kind, a few units wide; everything else as the conf has it."""
    small = {"moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 32, "num_moe_experts": 8, "moe_router_topk": 2}
    small |= {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 16}
    small |= {"qk_pos_emb_head_dim": 8, "v_head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_num_groups": 2}
    model = one_of_each_layer(model)
    fields = model.core_fields()
    core = {name: min(fields[name], size) for name, size in small.items() if fields.get(name)}
    sizes = {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16}
    if model.mla.multi_latent_attention:
        sizes["num_query_groups"] = 4
    return dataclasses.replace(model.with_core(core), **sizes, padded_vocab_size=128, vocab_size=120)


@pytest.mark.parametrize("name", [name for name in CONFS if "--num-experts" in CONFS[name].read_text()])
def test_experts_learn_with_the_flags_of_the_conf(name, world):
    from megatron_sft.model.attention import packed_seq_params
    from megatron_sft.model.build import build_model

    torch.manual_seed(1)
    (chunk,) = build_model(tiny(flags_of(name)[0]), ParallelConfig(), TrainConfig(params_dtype="bf16"))
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(120, (1, 24))
    lengths = torch.tensor([0, 14, 24], dtype=torch.int32)
    positions = torch.cat((torch.arange(14), torch.arange(10)))[None]
    loss = chunk(tokens, positions, None, labels=tokens.roll(-1), packed_seq_params=packed_seq_params(lengths, 14))
    loss.sum().backward()
    assert loss.isfinite().all()
    grads = {key: parameter.grad for key, parameter in chunk.named_parameters()}
    learnt = {key for key, grad in grads.items() if grad is not None and grad.isfinite().all()}
    assert [key for key in grads.keys() - learnt if ".local_experts." not in key] == []  # experts that no token chose
    assert any(".local_experts." in key for key in learnt)


@pytest.mark.parametrize("name", CONFS)
def test_layout_of_the_comment_fits(name):
    found = LAUNCH.search(CONFS[name].read_text())
    if found is None:
        assert "also in how it is launched" in CONFS[name].read_text()
        return
    gpus, sizes = int(found[1]), dict(item.split("=") for item in found[2].split())
    tp, pp, ep = (int(sizes.get(key, "1")) for key in ("TP", "PP", "EP"))
    etp = int(sizes.get("ETP", str(tp)))
    started = (tp if ep == 1 else etp * ep) * pp * int(sizes.get("DP", "1"))
    assert gpus == started, "conf/arguments.sh starts another number"
    assert found[3] == name
    extra = read_flags(shlex.split(found[4] or ""))[0] if found[4] else {}
    first, last = (extra.get(f"parallel.decoder_{end}_pipeline_num_layers", 0) for end in ("first", "last"))
    layout = ParallelConfig(
        tp,
        pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        decoder_first_pipeline_num_layers=first or None,
        decoder_last_pipeline_num_layers=last or None,
    )
    model, _ = flags_of(name)
    assert problems(RunConfig(model, layout), gpus, training=False) == []
    assert (model.num_layers - first - last) % (pp - (first > 0) - (last > 0)) == 0
    dense, experts = (count / 1e9 for count in their_parameters(name))
    states = (6 * dense / tp + 6 * experts / (ep * etp)) / pp + 12 * (dense + experts) / gpus
    assert states <= STATES_GB, f"{states:.0f} GB of weights, gradients and Adam states a GPU"


def test_models_page_lists_every_conf():
    page = (ROOT / "docs" / "models.md").read_text()
    rows = {cells[1]: cells[2:5] for cells in (re.split(r"\s*\|\s*", line) for line in page.split("\n")) if len(cells) == 7}
    assert [name for name in rows if "/" in name] == sorted(CONFS, key=str.lower)
    for name, path in CONFS.items():
        found = LAUNCH.search(path.read_text())
        base = re.search(r"source \"\$\{BASH_SOURCE\[0\]%/\*\}/(.*)\"", path.read_text())
        found = found or LAUNCH.search((path.parent / base[1]).read_text())
        billions = sum(their_parameters(name)) / 1e9
        assert rows[name] == [f"{billions:.3g} B" if billions < 1000 else f"{billions:.0f} B", found[1], found[2].strip()]
