"""Each of megatron-core's settings has an effect here, seen in weights, loss or gradients, or its flag is refused."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_sft.config.arguments import flag_table, parse, read_flags
from megatron_sft.config.fields import flag_of
from megatron_sft.config.run import EFFECTIVE, ParallelConfig
from megatron_sft.model.attention import packed_seq_params
from megatron_sft.model.build import build_model
from megatron_sft.parallel import finalize, initialize
from megatron_sft.weights import padded

DENSE = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 4 --kv-channels 8 "
    "--padded-vocab-size 64 --max-position-embeddings 64 --swiglu --position-embedding-type rope"
)
MOE = f"{DENSE} --num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2"
SIGMOID = f"{MOE} --moe-router-score-function sigmoid"
GROUPED = f"{SIGMOID} --num-experts 8 --moe-router-group-topk 1"
LATENT = f"{DENSE} --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 8"
YARN = f"{LATENT} --qk-pos-emb-head-dim 16 --rope-type yarn --rotary-scaling-factor 4 --original-max-position-embeddings 64"
MAMBA = (
    f"{DENSE.replace('--num-layers 2', '')} --mamba-num-heads 4 --mamba-head-dim 8 --mamba-num-groups 2 --mamba-state-dim 8 "
    "--hybrid-layer-pattern M*-"
)
OPPOSITES = {
    "num_moe_experts": (MOE, "--num-experts 8"),
    "moe_ffn_hidden_size": (MOE, "--moe-ffn-hidden-size 24"),
    "moe_layer_freq": (MOE, "--moe-layer-freq [1,0]"),
    "moe_latent_size": (MOE, "--moe-latent-size 8"),
    "moe_router_topk": (MOE, "--moe-router-topk 3"),
    "moe_router_score_function": (MOE, "--moe-router-score-function sigmoid"),
    "moe_router_pre_softmax": (MOE, "--moe-router-pre-softmax"),
    "moe_router_num_groups": (f"{GROUPED} --moe-router-num-groups 4", "--moe-router-num-groups 2"),
    "moe_router_group_topk": (f"{GROUPED} --moe-router-num-groups 4", "--moe-router-group-topk 2"),
    "moe_router_topk_scaling_factor": (SIGMOID, "--moe-router-topk-scaling-factor 2.5"),
    "moe_router_enable_expert_bias": (SIGMOID, "--moe-router-enable-expert-bias"),
    "moe_shared_expert_intermediate_size": (MOE, "--moe-shared-expert-intermediate-size 16"),
    "moe_apply_probs_on_input": (f"{SIGMOID} --moe-router-topk 1", "--moe-apply-probs-on-input"),
    "multi_latent_attention": (DENSE, "--multi-latent-attention --kv-lora-rank 16"),
    "q_lora_rank": (LATENT, "--q-lora-rank 16"),
    "kv_lora_rank": (LATENT, "--kv-lora-rank 8"),
    "qk_head_dim": (LATENT, "--qk-head-dim 16"),
    "qk_pos_emb_head_dim": (LATENT, "--qk-pos-emb-head-dim 4"),
    "v_head_dim": (LATENT, "--v-head-dim 16"),
    "mscale": (f"{YARN} --mscale-all-dim 0.5", "--mscale 0.7"),
    "mscale_all_dim": (YARN, "--mscale-all-dim 0.5"),
    "rotary_scaling_factor": (YARN, "--rotary-scaling-factor 8"),
    "rope_type": (YARN, "--rope-type rope"),
    "original_max_position_embeddings": (YARN, "--original-max-position-embeddings 512"),
    "beta_fast": (YARN, "--beta-fast 1.5"),
    "beta_slow": (f"{YARN} --beta-fast 2", "--beta-slow 0.1"),
    "rotary_interleaved": (DENSE, "--rotary-interleaved"),
    "no_rope_freq": (DENSE, "--no-rope-freq 2"),
    "qk_l2_norm": (DENSE, "--qk-l2-norm"),
    "softmax_scale": (DENSE, "--softmax-scale 0.1"),
    "softmax_type": (DENSE, "--softmax-type learnable"),
    "glu_linear_offset": (DENSE, "--glu-linear-offset 1"),
    "activation_func_clamp_value": (DENSE, "--activation-func-clamp-value 0.01"),
    "mamba_num_heads": (MAMBA, "--mamba-num-heads 8"),
    "mamba_head_dim": (MAMBA, "--mamba-head-dim 16"),
    "mamba_num_groups": (MAMBA, "--mamba-num-groups 4"),
    "mamba_state_dim": (MAMBA, "--mamba-state-dim 16"),
    "hybrid_layer_pattern": (MAMBA, "--hybrid-layer-pattern MM-"),
    "moe_router_load_balancing_type": (f"{MOE} --moe-aux-loss-coeff 1", "--moe-router-load-balancing-type none"),
    "moe_aux_loss_coeff": (MOE, "--moe-aux-loss-coeff 1"),
    "moe_z_loss_coeff": (MOE, "--moe-z-loss-coeff 1"),
    "moe_router_dtype": (f"{MOE} --bf16", "--moe-router-dtype fp64"),
}
"""Field -> flags of a model, and a flag that makes another one of it."""
ELSEWHERE = {
    "moe_router_bias_update_rate": "megatron-core moves the bias after a step, in finalize_model_grads",
    "moe_token_dispatcher_type": "has one value",
    "attention_dropout": "has one value",
    "hidden_dropout": "has one value",
    "transformer_impl": "has one value",
    "disable_bf16_reduced_precision_matmul": "sets torch.backends.cuda.matmul",
}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    initialize(ParallelConfig(), 1)
    yield
    finalize()


def outcome(flags: str) -> dict[str, Any]:
    """{"loss": ..., parameter or buffer: gradient's sum or shape} of a model with fixed weights on a fixed row."""
    run, _ = parse(flags.split(), 1, training=False)
    (chunk,) = build_model(padded(run.model, 1), run.parallel, run.train)
    generator = torch.Generator().manual_seed(0)
    for parameter in chunk.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(0, 64, (1, 24), generator=generator)
    positions = torch.cat([torch.arange(16), torch.arange(8)])[None]
    packed = packed_seq_params(torch.tensor([0, 16, 24], dtype=torch.int32), 16)
    loss = chunk(tokens, positions, None, labels=tokens.roll(-1), loss_mask=torch.ones(1, 24), packed_seq_params=packed).sum()
    loss.backward()
    found: dict[str, Any] = {name: tuple(buffer.shape) for name, buffer in chunk.named_buffers()}
    for name, parameter in chunk.named_parameters():
        found[name] = (tuple(parameter.shape), None if parameter.grad is None else float(parameter.grad.double().sum()))
    assert torch.isfinite(loss), "the model of the test is broken"
    return {**found, "loss": float(loss)}


def test_the_tables_name_every_effective_field() -> None:
    assert OPPOSITES.keys() | ELSEWHERE.keys() == EFFECTIVE.keys()


@pytest.mark.parametrize("field", OPPOSITES)
def test_a_setting_that_is_accepted_has_an_effect(field: str) -> None:
    flags, opposite = OPPOSITES[field]
    assert outcome(flags) == outcome(flags)
    assert outcome(flags) != outcome(f"{flags} {opposite}")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MLATransformerConfig)])
def test_every_field_of_megatron_core_has_an_effect_or_no_flag(field: str) -> None:
    """Of the installed version; CI has both. A flag of that name is ours, or it is refused with a sentence."""
    if field in EFFECTIVE:
        return
    flag = flag_table().get(flag_of(field))
    values, found = read_flags([flag_of(field), *([] if flag and flag.words == 0 else ["1"])])
    assert not any(path.startswith("core.") for path in values), "it reaches megatron-core without standing in core_fields.py"
    assert flag is not None or found, "accepted in silence"


def test_every_effective_field_is_megatron_cores() -> None:
    known = {field.name for field in dataclasses.fields(MLATransformerConfig)} | {"hybrid_layer_pattern"}
    assert EFFECTIVE.keys() - known == set(), "renamed or gone upstream"
