"""Grouped experts beside megatron-core's loop over them, in every family that has experts."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_sft.config.run import LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_sft.model.build import transformer_config
from megatron_sft.model.experts import GroupedExperts, _together
from megatron_sft.model.layers import BiasedRowParallelLinear
from megatron_sft.model.lora import Place, add_adapter
from megatron_sft.parallel import finalize, initialize
from tests.unit.hf.tiny_models import KEYS
from tests.unit.model.test_families import make_pair, make_row, ours

LENGTHS = [14, 1, 4, 11]
EXPERTS, WIDTH, INNER = 4, 16, 24


@pytest.fixture(scope="module")
def ranks():
    yield initialize(ParallelConfig(), 1)
    finalize()


@pytest.fixture
def products(monkeypatch):
    """How many grouped products were made."""
    count, product = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **kwargs: count.append(1) or product(*args, **kwargs))
    return count


def expert_families() -> list[str]:
    return [name for name, keys in KEYS.items() if any("experts" in key for key in keys)]


def apart(ours, theirs):
    """Norm of the difference over the norm."""
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


@pytest.mark.parametrize("name", expert_families())
def test_a_family_with_experts_is_that_of_the_loop(name, ranks, tmp_path, products, monkeypatch):
    pair = make_pair(name, tmp_path, ranks, 2 if name != "nemotron_h-moe" else 4)
    row = make_row(LENGTHS, pair.model.vocab_size, seed=1)

    def passed():
        pair.chunk.zero_grad()
        loss = ours(pair, row)
        loss.sum().backward()
        return loss.detach(), {key: p.grad.clone() for key, p in pair.chunk.named_parameters() if p.grad is not None}

    loss, gradients = passed()
    layers = sum(isinstance(module, GroupedExperts) for module in pair.chunk.modules())
    assert layers and len(products) == 6 * layers  # two projections, forward and two gradients each
    monkeypatch.setattr(GroupedExperts, "forward", SequentialMLP.forward)
    expected, theirs = passed()
    assert len(products) == 6 * layers and apart(loss, expected) <= 1e-6 and gradients.keys() == theirs.keys()
    for key, gradient in gradients.items():
        assert apart(gradient, theirs[key]) <= 1e-6, key


def layer(dtype: str, **fields) -> GroupedExperts:
    """Four experts with biases."""
    sizes = dict(num_layers=1, hidden_size=WIDTH, ffn_hidden_size=INNER, num_attention_heads=2, num_query_groups=2)
    sizes |= dict(kv_channels=8, vocab_size=8, padded_vocab_size=8, max_position_embeddings=8, add_bias_linear=True)
    model = ModelConfig(**{**sizes, **fields})
    model = model.with_core({"num_moe_experts": EXPERTS, "moe_ffn_hidden_size": INNER, "moe_router_topk": 2})
    config = transformer_config(model, ParallelConfig(), TrainConfig(params_dtype=dtype))
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=BiasedRowParallelLinear)
    made = GroupedExperts(EXPERTS, config, parts, ProcessGroupCollection.use_mpu_process_groups())
    torch.manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    return made


def run(module, forward, hidden, counts, probs):
    """Output and gradients of tokens, probabilities and parameters."""
    leaves = [hidden.clone().requires_grad_(), probs.clone().requires_grad_()]
    output, bias = forward(module, leaves[0], counts, leaves[1])
    assert bias is None
    wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), wanted)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("gated", [False, True])
def test_empty_experts_biases_and_frozen_weights(dtype, gated, ranks, products):
    module = layer(dtype, gated_mlp=gated)
    module.local_experts[2].linear_fc1.weight.requires_grad_(False)
    counts = torch.tensor([5, 0, 9, 3])
    hidden = torch.randn(17, WIDTH).to(next(module.parameters()).dtype)
    probs = torch.rand(17)
    grouped = run(module, GroupedExperts.forward, hidden, counts, probs)
    assert len(products) == 6
    for mine, theirs in zip(grouped, run(module, SequentialMLP.forward, hidden, counts, probs), strict=True):
        assert mine.dtype == theirs.dtype and apart(mine.float(), theirs.float()) <= (1e-6 if dtype == "fp32" else 4e-3)


def test_the_loop_takes_what_grouped_products_do_not(ranks, products):
    """No tokens; an adapter on one expert, which adds to that expert's output."""
    module, probs = layer("fp32"), torch.rand(8)
    output, _ = module(torch.empty(0, WIDTH), torch.zeros(EXPERTS, dtype=torch.int64), probs[:0])
    assert output.shape == (0, WIDTH) and not products
    counts, hidden = torch.tensor([2, 2, 2, 2]), torch.randn(8, WIDTH)
    before, _ = module(hidden, counts, probs)
    assert len(products) == 2
    base = module.local_experts[1].linear_fc2
    place = Place(("down",), (), ((0, WIDTH),), (WIDTH,), 0, INNER)
    add_adapter(base, place, LoraConfig(lora_rank=2)).b.data.fill_(1.0)
    base.lora.a.data.fill_(1.0)
    after, _ = module(hidden, counts, probs)
    changed = (after - before).abs().amax(dim=1) > 1e-6
    assert len(products) == 2 and changed.tolist() == [False, False, True, True, False, False, False, False]


def test_weights_are_stacked_without_a_copy_until_something_moves_them(ranks):
    weights = tuple(expert.linear_fc1.weight for expert in layer("fp32").local_experts)
    together = _together(weights)
    assert together.data_ptr() == weights[0].data_ptr() and torch.equal(together, torch.stack(weights))
    weights[2].data = weights[2].data.clone()
    moved = _together(weights)
    assert moved.data_ptr() != weights[0].data_ptr() and torch.equal(moved, torch.stack(weights))
    backwards = torch.randn(3, 2, 5)
    assert torch.equal(_together(tuple(backwards.flip(0))), backwards.flip(0))
    assert torch.equal(_together(tuple(backwards[order] for order in (2, 1, 0))), backwards.flip(0))
