"""`megatron-sft plan`: parameters are those of the ranks that are really built, saved bytes those that autograd saves."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sft import core_compat
from megatron_sft.__main__ import main
from megatron_sft.config.arguments import parse
from megatron_sft.config.options import PlanConfig
from megatron_sft.config.run import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.errors import ConfigError
from megatron_sft.model.activations import Activations
from megatron_sft.model.pattern import layer_kinds
from megatron_sft.parallel import finalize, imagined, initialize
from megatron_sft.plan import conf_flags, plan, rank_parameters
from megatron_sft.shell import confs

TINY = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=24,
    vocab_size=120,
    padded_vocab_size=128,
    max_position_embeddings=256,
    normalization="LayerNorm",
)
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_layer_freq": [0, 1, 1, 1]}
EXPERTS["moe_shared_expert_intermediate_size"] = 48
LATENT = {"multi_latent_attention": True, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8}
LATENT["v_head_dim"] = 24
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 12, "mamba_num_groups": 2, "mamba_state_dim": 16}
NARROW = "--use-precision-aware-optimizer --main-grads-dtype bf16 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16".split()


def model(core: Mapping[str, Any] | None = None, **changed: object) -> ModelConfig:
    return dataclasses.replace(TINY, **changed).with_core(core or {})


@pytest.mark.parametrize(
    ("tiny", "layout", "gpus"),
    [
        (model(), ParallelConfig(2, 2, sequence_parallel=True), 4),
        (model(), ParallelConfig(1, 3, decoder_first_pipeline_num_layers=2, decoder_last_pipeline_num_layers=1), 3),
        (model(share_embeddings_and_output_weights=False), ParallelConfig(1, 2, 2), 4),
        (model(core=EXPERTS), ParallelConfig(2, 2, None, 1, 4, 1, sequence_parallel=True), 8),
        (model(core=EXPERTS), ParallelConfig(2, 1, None, 1, 2, 2, sequence_parallel=True), 4),
        (model(core={**MAMBA, "hybrid_layer_pattern": "M*-M"}), ParallelConfig(2, 2, sequence_parallel=True), 4),
        (model(num_query_groups=4, core=LATENT), ParallelConfig(4, sequence_parallel=True), 4),
    ],
)
def test_parameters_are_those_of_every_rank(tiny: ModelConfig, layout: ParallelConfig, gpus: int) -> None:
    from megatron.core import parallel_state

    from megatron_sft.model.build import build_model

    run = RunConfig(tiny, layout, train=TrainConfig(params_dtype="bf16"))
    counts = rank_parameters(run, gpus)
    for rank in range(gpus):
        with imagined(layout, gpus, rank), torch.device("meta"):
            chunks = build_model(tiny, layout, run.train)
            stage = parallel_state.get_pipeline_model_parallel_rank()
        built = [(name, parameter.numel()) for chunk in chunks for name, parameter in chunk.named_parameters()]
        experts = sum(size for name, size in built if ".experts." in name)
        assert counts[stage] == (sum(size for _, size in built) - experts, experts)


def saved_bytes(tiny: ModelConfig, train: TrainConfig, tokens: int) -> int:
    """Of the storages that autograd keeps, without the parameters: one document."""
    from megatron_sft.model.attention import packed_seq_params
    from megatron_sft.model.build import build_model

    (chunk,) = build_model(tiny, ParallelConfig(), train)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, positions = torch.randint(120, (1, tokens)), torch.arange(tokens)[None]
    packed = packed_seq_params(torch.tensor([0, tokens], dtype=torch.int32), tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk(ids, positions, None, labels=ids.roll(-1), packed_seq_params=packed)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
SAVED = {
    "gated": (model(), {}, 0.99, 1.01),
    "fp32": (model(), {"params_dtype": "fp32"}, 0.99, 1.01),
    "plain, norms of heads": (model(gated_mlp=False, activation="gelu", qk_layernorm=True), {}, 0.99, 1.03),
    "norms behind": (model(norm_placement="pre_post", add_bias_linear=False), {}, 0.99, 1.02),
    "all recomputed": (model(), FULL, 0.99, 1.02),
    "attention recomputed": (model(), {"recompute_granularity": "selective"}, 0.99, 1.02),
    "experts": (model(core=EXPERTS), {}, 0.97, 1.05),
    "latent": (model(num_query_groups=4, core=LATENT), {}, 0.96, 1.02),
    "Mamba": (model(position_embedding_type="none", core={**MAMBA, "hybrid_layer_pattern": "MM-M"}), {}, 0.97, 1.05),
}
"""Model, training and bounds of measured / formula, which has no statistics of norms and a whole head of rotary table (latent
attention turns a part). LayerNorm, because an RMS norm is one operation on CUDA and several in fp32 on a CPU."""


def test_formula_counts_what_autograd_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    initialize(ParallelConfig(), 1)
    monkeypatch.setattr(core_compat, "products_in_fp32", set())  # which the formula, of GPUs, does not know
    ratios = {}
    for name, (tiny, changed, _, _) in SAVED.items():
        train = TrainConfig(**{"params_dtype": "bf16", **changed})
        formula = Activations(tiny, ParallelConfig(), train)
        ratios[name] = saved_bytes(tiny, train, 128) / 128 / (formula.stage(layer_kinds(tiny)) + formula.last())
    finalize()
    assert all(low <= ratios[name] <= high for name, (_, _, low, high) in SAVED.items()), ratios


CONF = """MODEL_ARGS=(--bf16 --swiglu --untie-embeddings-and-output-weights --num-layers 4 --hidden-size 64 --ffn-hidden-size 128
  --num-attention-heads 4 --num-query-groups 2 --kv-channels 16 --padded-vocab-size 128 --max-position-embeddings 64
  --seq-length 32 --normalization RMSNorm --position-embedding-type rope)
"""
LAYER = (64 + 2 * 32) * 64 + 64 * 64 + 2 * 128 * 64 + 128 * 64 + 2 * 64
PARAMETERS = 2 * 128 * 64 + 4 * LAYER + 64


def test_memory_and_traffic_of_a_tiny_model(tmp_path: Path) -> None:
    conf = tmp_path / "org" / "tiny.sh"
    conf.parent.mkdir()
    conf.write_text(CONF)
    flags = ["--use-distributed-optimizer", "--gpus", "2", "--global-batch-size", "4"]
    run, given, options = parse([*conf_flags(str(conf)), *flags], 1, options=PlanConfig)
    made = plan(run, given, options, str(conf), [])
    rows = {next(name for name in ("TP", "PP", "CP", "DP") if row.sizes[name] == 2): row for row in made}
    expected = {"DP": PARAMETERS, "CP": PARAMETERS, "TP": 128 * 64 + 2 * (LAYER - 128) + 4 * 128 + 64}
    expected["PP"] = 128 * 64 + 2 * LAYER  # the first stage holds two micro-batches
    assert {name: row.parameters for name, row in rows.items()} == expected

    for name, row in rows.items():
        sharded = 2 if name in ("DP", "CP") else 1
        assert (row.weights_gb, row.gradients_gb) == (expected[name] * 2 / 1e9, expected[name] * 4 / 1e9)
        assert row.optimizer_gb == expected[name] * 12 / sharded / 1e9
        assert row.micro_batches == (2 if name == "DP" else 4)
    run, given, options = parse(
        [*conf_flags(str(conf)), *flags, "--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.25"], 1, options=PlanConfig
    )
    for row in plan(run, given, options, str(conf), []):
        (before,) = [other for other in made if other.sizes == row.sizes]
        assert (row.optimizer_gb, row.host_gb) == pytest.approx((before.optimizer_gb * 0.75, before.optimizer_gb * 0.25))
        assert row.total_gb == pytest.approx(before.total_gb - row.host_gb)
    row_bytes = 32 * 64 * 2
    gradients = 6 * PARAMETERS / 2  # half scattered in fp32, half gathered in bf16
    sent = {
        "DP": {"DP": gradients},
        "CP": {"DP": gradients, "CP": 4 * 2 * 4 * (4 + 4 + 2 + 2) * 16 * 16 * 2 / 2},  # 16 tokens; q, output, k, v of 16
        "TP": {"TP": 4 * (8 * 5 + 4) * row_bytes / 2},
        "PP": {"PP": 4 * row_bytes},
    }
    for name, row in rows.items():
        assert row.sent_gb == pytest.approx({**dict.fromkeys(row.sent_gb, 0.0), **{k: v / 1e9 for k, v in sent[name].items()}})
    assert rows["TP"].command == f"TP=2 MLM_EXTRA_ARGS=--sequence-parallel ./finetune.sh {conf}"
    assert rows["DP"].command == f"DP=2 ./finetune.sh {conf}"


def test_8b_with_adam_fits_one_gpu_of_141_gb_at_12_bytes_a_parameter(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = tmp_path / "plan.json"
    asked = ["plan", "Qwen/Qwen3-8B", "--gpus", "1", "--gpu-memory", "141"]
    assert main([*asked, *NARROW, "--json", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 layouts fit 1 x 141 GB" in shown
    assert f"best: MLM_EXTRA_ARGS='{' '.join(NARROW)}' ./finetune.sh Qwen/Qwen3-8B" in shown
    [row] = json.loads(table.read_text())
    states = [row[f"{name}_gb"] for name in ("weights", "gradients", "optimizer")]
    assert (row["parameters"], row["fits"]) == (8_190_735_360, True)
    assert sum(states) == pytest.approx(12 * 8.190735360)
    assert row["total_gb"] == pytest.approx(sum(states) + row["activations_gb"] + row["workspace_gb"] + 2)
    assert main(asked) == 2  # 18 bytes per parameter


def test_problems_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wrong = {
        ("Qwen/Qwen3-9B",): "Qwen/Qwen3-9B: no such conf; expected one such as",
        ("--gpus", "8"): "plan: no model named; expected a conf such as Qwen/Qwen3-8B",
        ("Qwen/Qwen3-0.6B", "--gpu-memory", "4"): "no layout fits 1 x 4 GB: the nearest, one GPU, needs",
        ("Qwen/Qwen3-0.6B", "--gpus", "3", "--tensor-model-parallel-size", "2"): "3 GPUs cannot be cut as asked",
        (
            "openai/gpt-oss-20b",
            "--gpus",
            "2",
            "--expert-tensor-parallel-size",
            "2",
        ): "cuts no expert that has biases. Use 1",
        ("Qwen/Qwen3-0.6B", "--gpus", "0", "--seq-lenth", "5"): "Did you mean --seq-length?",
    }
    for argv, message in wrong.items():
        assert main(["plan", *argv]) == 2, argv
        assert message in capsys.readouterr().out
    (tmp_path / "config.json").write_text((Path(__file__).parents[1] / "assets/hf_configs/Qwen__Qwen3-0.6B.json").read_text())
    assert conf_flags(str(tmp_path)) == conf_flags("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("name", ["{way}/evil", "evil.sh", "evil", "{folder}/evil", "conf/Qwen"])
def test_only_a_conf_or_a_named_script_is_sourced(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("evil.sh", "evil"):
        (tmp_path / file).write_text(f"touch '{tmp_path}/marker'\nMODEL_ARGS=(--bf16)\n")
    with pytest.raises(
        ConfigError, match=r"no such conf; expected one such as .*, \./NAME\.sh or /PATH/NAME\.sh, or an HF folder"
    ):
        conf_flags(name.format(way=os.path.relpath(tmp_path, confs()), folder=tmp_path))
    assert not (tmp_path / "marker").exists()
    assert conf_flags("./evil.sh") == ["--bf16"] and (tmp_path / "marker").exists()


def test_the_pages_commands_fit(capsys: pytest.CaptureFixture) -> None:
    lines = (Path(__file__).parents[2] / "docs" / "plan.md").read_text().split("\n")
    asked = [line.split()[1:] for line in lines if line.startswith("megatron-sft plan ")]
    assert [main(argv) for argv in asked] == [0, 0, 0]
    assert next(line for line in lines if line.endswith("./finetune.sh Qwen/Qwen3-8B")) in capsys.readouterr().out


def test_adapters_alone_have_gradients_and_optimizer_states() -> None:
    from megatron_sft.plan import rank_parameters, trained_parameters

    flags = ["--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "96", "--num-attention-heads", "4"]
    flags += ["--num-query-groups", "2", "--kv-channels", "16", "--vocab-size", "128", "--padded-vocab-size", "128", "--swiglu"]
    flags += ["--disable-bias-linear", "--normalization", "RMSNorm", "--max-position-embeddings", "64", "--lora-rank", "4"]
    rest = ["--train-data", "any", "--tokenizer-model", "any", "--load", "any"]
    run = parse([*flags, *rest], 1)[0]
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    assert trained_parameters(run, 1) == [(2 * 4 * sum(a + b for a, b in widths), 0)]
    assert trained_parameters(run, 1)[0][0] * 4 < rank_parameters(run, 1)[0][0]
    ends = parse([*flags, "--untie-embeddings-and-output-weights", "--lora-target-modules", "embed_tokens", "lm_head", *rest], 1)[
        0
    ]
    assert trained_parameters(ends, 1) == [(2 * 4 * (128 + 64), 0)]
