"""Adapters against peft on transformers, fp32: outputs, 20 steps of training, folders both ways, merged weights."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sft.config.run import CheckpointConfig, LoraConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.errors import CheckpointError, ConfigError
from megatron_sft.hf.adapters import attach, fingerprint, freeze
from megatron_sft.hf.config import likely_model_type
from megatron_sft.hf.exporter import save_hf
from megatron_sft.hf.peft import load_peft, read_settings, refuse_unreadable, save_peft, unreadable
from megatron_sft.model.lora import adapters_of
from megatron_sft.parallel import finalize, initialize
from megatron_sft.weights import WeightSource, base_model_type, build, resolve
from tests.distributed.lora_rig import fill_b
from tests.unit.model.test_families import Pair, make_pair, make_row, ours

DOWN = r"model\.layers\.[0-9]+\.mlp\.experts\.[0-9]+\.down_proj"
"""Of experts: of gate and up, peft trains one adapter of twice the rank, all of its B."""
EXPERTS = r"model\.layers\.[0-9]+\.mlp\.experts\..*"
CASES = {
    "qwen3": LoraConfig(lora_rank=4, lora_alpha=8.0),
    "qwen3 rslora": LoraConfig(lora_rank=4, lora_alpha=8.0, lora_type="rslora"),
    "qwen3 dora": LoraConfig(lora_rank=4, lora_alpha=8.0, lora_type="dora"),
    "qwen3 some": LoraConfig(lora_rank=3, lora_target_modules=("k_proj", "v_proj", "down_proj", "up_proj")),
    "qwen3 ends": LoraConfig(lora_rank=4, lora_target_modules=("embed_tokens", "lm_head", "q_proj")),
    "gemma2": LoraConfig(lora_rank=4),
    "phi3": LoraConfig(lora_rank=4),
    "nemotron_h": LoraConfig(lora_rank=4, lora_target_modules=("in_proj", "v_proj")),  # out_proj: below
    "nemotron_h-latent": LoraConfig(lora_rank=4, lora_target_modules=("in_proj", "fc1_latent_proj", "fc2_latent_proj")),
    "mixtral": LoraConfig(lora_rank=4),
    "qwen3_moe": LoraConfig(lora_rank=4, lora_alpha=4.0, lora_target_modules=("q_proj", "o_proj", EXPERTS)),
    "qwen3_moe rslora": LoraConfig(
        lora_rank=4, lora_alpha=4.0, lora_type="rslora", lora_target_modules=("v_proj", "o_proj", EXPERTS)
    ),
    "deepseek_v3": LoraConfig(
        lora_rank=4, lora_target_modules=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", EXPERTS)
    ),
    "qwen3_moe down": LoraConfig(lora_rank=4, lora_target_modules=("q_proj", DOWN)),
    "deepseek_v3 down": LoraConfig(lora_rank=4, lora_target_modules=("q_a_proj", "kv_b_proj", "o_proj", DOWN)),
    "deepseek_v3 every": LoraConfig(lora_rank=4),
    "qwen3_moe dropout": LoraConfig(lora_rank=4, lora_dropout=0.5, lora_target_modules=("q_proj", "o_proj", EXPERTS)),
}
LOADED = [name for name in CASES if name != "deepseek_v3 every"]
TRAINED = ("qwen3", "qwen3 ends", "qwen3 rslora", "qwen3 dora", "qwen3_moe down", "deepseek_v3 down")
STEPS = 20


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    yield initialize(ParallelConfig(), 1)
    finalize()


def pair_of(name: str, folder: Path, ranks: Any) -> Pair:
    """A model with the names of its own family, as weights.build makes it; its HF folder is folder/base."""
    pair = make_pair(name, folder / "base", ranks, 4 if name == "nemotron_h-latent" else 2)
    pair.chunk.hf_model_type = pair.theirs.config.model_type
    return pair


def adapted(name: str, folder: Path, ranks: Any) -> tuple[Pair, RunConfig]:
    """A model with random adapters, saved beside it in folder/adapter."""
    pair = pair_of(name.split()[0], folder, ranks)
    run = RunConfig(pair.model, lora=CASES[name])
    attach([pair.chunk], run, ranks)
    fill_b([pair.chunk])
    freeze([pair.chunk], run, ranks)
    save_peft([pair.chunk], run, folder / "adapter", ranks, str(folder / "base"))
    return pair, run


def peft_model(folder: Path, adapter: str = "adapter", trains: bool = False) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(base, folder / adapter, is_trainable=trains).eval()


def their_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", LOADED)
def test_peft_loads_the_folder_and_merging_gives_the_same(name: str, ranks: Any, tmp_path: Path) -> None:
    pair, run = adapted(name, tmp_path, ranks)
    refuse_unreadable([pair.chunk], run, ranks)
    pair.chunk.eval()
    row = make_row([12], pair.model.vocab_size, 3)
    with torch.no_grad():
        own = ours(pair, row, with_labels=False)
    expected, plain = their_logits(peft_model(tmp_path), row.tokens), their_logits(pair.theirs, row.tokens)
    largest = expected.abs().max()
    assert (own - expected).abs().max() < 1e-5 * largest
    assert (expected - plain).abs().max() > 1e-2 * largest
    assert (merged_logits(pair, tmp_path, row.tokens) - expected).abs().max() < 1e-4 * largest


def merged_logits(pair: Pair, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of transformers, on the plain folder that merging writes."""
    from transformers import AutoModelForCausalLM

    balanced = pair.model.with_core({"moe_aux_loss_coeff": 0.001}) if pair.model.moe.num_moe_experts else pair.model
    save_hf([pair.chunk], balanced, folder / "merged", pair.ranks, folder / "base")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32, attn_implementation="eager")
    return their_logits(merged.eval(), tokens)


def test_adapters_that_peft_puts_elsewhere_are_refused_and_merged(ranks: Any, tmp_path: Path) -> None:
    """PEFT moves gate_proj, up_proj and down_proj of the dense layer and the shared experts to the experts alone."""
    pair, run = adapted("deepseek_v3 every", tmp_path, ranks)
    row = make_row([12], pair.model.vocab_size, 3)
    with torch.no_grad():
        own = ours(pair, row, with_labels=False)
    largest = own.abs().max()
    assert (their_logits(peft_model(tmp_path), row.tokens) - own).abs().max() > 1e-2 * largest
    assert (merged_logits(pair, tmp_path, row.tokens) - own).abs().max() < 1e-4 * largest
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.down_proj and its like on experts alone .* Add --lora-merge"):
        refuse_unreadable([pair.chunk], run, ranks)


def test_a_run_that_would_write_such_a_folder_is_refused_when_it_is_built(ranks: Any, tmp_path: Path) -> None:
    pair_of("deepseek_v3", tmp_path, ranks)
    base, out = str(tmp_path / "base"), str(tmp_path / "out")
    run = RunConfig(
        train=TrainConfig(params_dtype="fp32"),
        lora=LoraConfig(lora_rank=2),
        checkpoint=CheckpointConfig(load=base, save_hf=out, verify_conversion=False),
    )
    run, source = resolve(run, frozenset(), training=False)
    with pytest.raises(ConfigError, match="--save-hf with --lora-target-modules all-linear: PEFT puts adapters"):
        build(run, source, ranks)
    merging = dataclasses.replace(run, lora=dataclasses.replace(run.lora, lora_merge=True))
    assert adapters_of(build(merging, source, ranks)[0])


@pytest.mark.parametrize(
    ("model_type", "own", "lora_type", "found"),
    [
        ("qwen3_moe", "o_proj experts.0.up experts.1.up experts.0.gate experts.1.gate", "lora", []),
        ("qwen3_moe", "experts.0.gate experts.1.gate", "lora", ["of gate without up"]),
        ("qwen3_moe", "experts.0.up experts.0.gate", "lora", ["some experts without the others"]),
        ("qwen3_moe", "experts.0.down experts.1.down", "dora", ["no DoRA of experts"]),
        ("qwen3_moe", "o_proj", "dora", []),
        ("mixtral", "experts.0.down experts.1.down up_proj", "lora", ["x.up_proj and its like"]),
        ("nemotron_h", "in_proj out_proj", "lora", ["refuses adapters of out_proj"]),
        ("nemotron_h", "in_proj experts.0.up experts.1.up", "lora", ["does not find experts"]),
        ("nemotron_h", "in_proj up_proj", "lora", []),
        ("qwen3", "o_proj up_proj", "dora", []),
    ],
)
def test_what_peft_cannot_read_is_known(model_type: str, own: str, lora_type: str, found: list[str]) -> None:
    experts = {f"x.experts.{number}.{part}_proj" for number in (0, 1) for part in ("gate", "up", "down")}
    every = {"x.in_proj", "x.out_proj", "x.o_proj", "x.up_proj", *experts}
    names = {f"x.{name}" if name.endswith("_proj") else f"x.{name}_proj" for name in own.split()}
    clauses = unreadable(model_type, every, names, lora_type)
    assert len(clauses) == len(found) and all(part in clause for part, clause in zip(found, clauses, strict=True)), clauses


def test_names_are_those_of_the_base_s_family(ranks: Any, tmp_path: Path) -> None:
    """The architecture alone does not say it: a Phi-3 model is a Llama model with its projections fused."""
    pair = pair_of("phi3", tmp_path, ranks)
    run = RunConfig(pair.model, checkpoint=CheckpointConfig(load=str(tmp_path / "base")))
    source = WeightSource(str(tmp_path / "base"), True, False, {})
    elsewhere = WeightSource("none", False, False, {})
    assert (base_model_type(run, source), base_model_type(run, elsewhere)) == ("phi3", "phi3")
    other = dataclasses.replace(run, checkpoint=CheckpointConfig(load=str(tmp_path)))
    assert base_model_type(other, elsewhere) == "" and likely_model_type(pair.model) != "phi3"
    trained = WeightSource("none", False, False, {"base_weights": "phi3:0123"}, base=elsewhere)
    assert base_model_type(other, trained) == "phi3"
    wider = dataclasses.replace(run, model=dataclasses.replace(pair.model, hidden_size=128))
    assert base_model_type(wider, elsewhere) == ""
    assert likely_model_type(make_pair("qwen3_moe", tmp_path / "experts", ranks, 2).model) == "qwen3_moe"


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_peft(name: str, ranks: Any, tmp_path: Path) -> None:
    pair, run = adapted(name, tmp_path, ranks)
    theirs = peft_model(tmp_path, trains=True)
    if run.lora.lora_type == "rslora":  # with peft's own formula
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True, "lora_alpha": run.lora.lora_alpha}))
        theirs = peft_model(tmp_path, trains=True)
    optimizers = [  # an epsilon above the gradients' rounding: with 1e-6 peft itself ends 2e-4 from its run in fp64
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3, weight_decay=0.0)
        for model in (pair.chunk, theirs)
    ]
    for step in range(STEPS):
        row = make_row([12], pair.model.vocab_size, step)
        own = (ours(pair, row) * row.mask).sum() / row.mask.sum()
        token_loss = torch.nn.functional.cross_entropy(theirs(row.tokens).logits[0], row.labels[0], reduction="none")
        loss = (token_loss * row.mask[0]).sum() / row.mask.sum()
        assert abs(own.item() - loss.item()) < 1e-5 * loss.item(), step
        for value, optimizer in zip((own, loss), optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    save_peft([pair.chunk], run, tmp_path / "ours", ranks)
    if pair.model.moe.num_moe_experts is None:
        found, wanted = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("ours", "theirs"))
        assert found.keys() == wanted.keys()
        apart = {key: float((found[key] - wanted[key]).abs().max() / wanted[key].abs().max()) for key in wanted}
        assert max(apart.values()) < 1e-4, apart
    else:  # peft writes experts otherwise: its folder is compared by what it computes
        row = make_row([12], pair.model.vocab_size, 99)
        with torch.no_grad():
            assert (ours(pair, row, with_labels=False) - theirs(row.tokens).logits).abs().max() < 1e-4


def test_a_folder_of_peft_is_read_and_a_wrong_one_refused(ranks: Any, tmp_path: Path) -> None:
    from peft import LoraConfig as TheirConfig
    from peft import get_peft_model

    pair = pair_of("qwen3", tmp_path, ranks)
    model = get_peft_model(
        pair.theirs, TheirConfig(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    settings, _ = read_settings(tmp_path / "adapter")
    run = RunConfig(pair.model, lora=LoraConfig(**settings))
    assert run.lora.scale == 3.0 and run.lora.lora_target_modules == ("o_proj", "q_proj")
    before = fingerprint([pair.chunk], pair.model, ranks)
    attach([pair.chunk], run, ranks)
    assert load_peft([pair.chunk], tmp_path / "adapter", ranks) == "" and fingerprint([pair.chunk], pair.model, ranks) == before
    row = make_row([12], pair.model.vocab_size, 3)
    with torch.no_grad():
        apart = ours(pair, row, with_labels=False) - model.eval()(row.tokens).logits
    assert apart.abs().max() < 1e-4
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = min(tensors)
    for value in (float("nan"), float("inf")):
        broken = {**tensors, first: tensors[first].clone()}
        broken[first].view(-1)[-1] = value
        save_file(broken, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{re.escape(first)} has NaN or Inf"):
            load_peft([pair.chunk], tmp_path / "adapter", ranks)
    path = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    wrong = [
        ({"bias": "all", "rank_pattern": {"q_proj": 8}}, "bias is 'all', rank_pattern is"),
        ({"r": 4.5}, "r is 4.5"),
        ({"r": "2"}, "r is '2'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"target_modules": None}, "target_modules is None"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is {'top_k': 3}"),
        ({"of_a_later_peft": True, "of_a_later_peft_size": 16}, r"json: of_a_later_peft is True\. Expected"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ]
    for change, named in wrong:
        path.write_text(json.dumps({**written, **change}))
        with pytest.raises(CheckpointError, match=named):
            read_settings(tmp_path / "adapter")


@pytest.mark.parametrize("first", ["pissa", "olora", "orthogonal"])
def test_an_adapter_for_which_peft_changes_the_base_is_refused(first: str, ranks: Any, tmp_path: Path) -> None:
    from peft import LoraConfig as TheirConfig
    from peft import PeftModel, get_peft_model

    theirs = pair_of("qwen3", tmp_path, ranks).theirs
    weight = theirs.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    settings: Any = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": first}
    get_peft_model(theirs, TheirConfig(**settings)).save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        weight.copy_(before)
    loaded = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    changed = not torch.equal(loaded.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight, before)
    assert changed == (first != "orthogonal")
    if changed:
        with pytest.raises(CheckpointError, match=f"init_lora_weights is '{first}'"):
            read_settings(tmp_path / "adapter")
    else:
        read_settings(tmp_path / "adapter")


def test_names_that_no_weight_has_are_refused_at_once(ranks: Any, tmp_path: Path) -> None:
    pair = pair_of("qwen3", tmp_path, ranks)
    lora = LoraConfig(lora_rank=2, lora_target_modules=("q_proj", "qproj", "w1"))
    with pytest.raises(ConfigError) as error:
        attach([pair.chunk], RunConfig(pair.model, lora=lora), ranks)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "--lora-target-modules qproj",
        "--lora-target-modules w1",
    ]
    assert "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj" in error.value.problems[0]


def test_the_fingerprint_sees_every_change_and_no_adapter(ranks: Any, tmp_path: Path) -> None:
    pair = pair_of("qwen3", tmp_path, ranks)
    first = fingerprint([pair.chunk], pair.model, ranks)
    weight = pair.chunk.decoder.layers[1].mlp.linear_fc1.weight
    with torch.no_grad():
        kept = weight.clone()
        weight[[0, 1]] = weight[[1, 0]]
        assert fingerprint([pair.chunk], pair.model, ranks) != first
        weight.copy_(kept)
        weight[3, 5] *= 1.01
        assert fingerprint([pair.chunk], pair.model, ranks) != first
        weight.copy_(kept)
    attach([pair.chunk], RunConfig(pair.model, lora=CASES["qwen3"]), ranks)
    assert fingerprint([pair.chunk], pair.model, ranks) == first and len(adapters_of(pair.chunk)) == 8


def test_parameters_are_chosen_by_either_name(ranks: Any, tmp_path: Path) -> None:
    pair = pair_of("qwen3_moe", tmp_path, ranks)
    run = RunConfig(pair.model)

    def trained(**settings: Any) -> set[str]:
        for parameter in pair.chunk.parameters():
            parameter.requires_grad_(True)
        freeze([pair.chunk], dataclasses.replace(run, train=dataclasses.replace(run.train, **settings)), ranks)
        return {name for name, parameter in pair.chunk.named_parameters() if parameter.requires_grad}

    every = trained()
    assert trained(freeze=(r"layers\.0\.", "embed_tokens")) == {
        name for name in every if ".layers.0." not in name and "embedding" not in name
    }
    assert trained(train_only=("router",)) == {name for name in every if "router" in name} != set()
    for word, text in (
        ("q_proj", "means a part of a fused parameter"),
        ("nothing", "no parameter has it"),
        (".", "nothing is left"),
    ):
        with pytest.raises(ConfigError, match=text):
            trained(freeze=(word,))


@pytest.mark.parametrize(
    ("model", "lora_type", "why"),
    [("llama-tied", "lora", "are one tensor here"), ("qwen3", "dora", "have none with dora")],
)
def test_ends_that_cannot_have_adapters_are_refused(model: str, lora_type: str, why: str, ranks: Any, tmp_path: Path) -> None:
    pair = pair_of(model, tmp_path, ranks)
    lora = LoraConfig(lora_rank=2, lora_type=lora_type, lora_target_modules=("q_proj", "embed_tokens"))
    with pytest.raises(ConfigError, match=f"embed_tokens: such weights cannot have an adapter. Embeddings and head {why}"):
        attach([pair.chunk], RunConfig(pair.model, lora=lora), ranks)
