"""Every family of names.py against transformers: logits, per-token losses and gradients of tiny random models, fp32."""

import dataclasses

import pytest
import torch

from megatron_sft.checkpoint.hf import load_hf_weights
from megatron_sft.checkpoint.hf_config import model_config_from_hf, read_hf_config
from megatron_sft.config import ParallelConfig, TrainConfig
from megatron_sft.core_compat import builds_latent_attention
from megatron_sft.errors import ConfigError
from megatron_sft.model.attention import packed_seq_params
from megatron_sft.model.build import build_model
from megatron_sft.parallel import finalize, initialize
from tests.unit.checkpoint.tiny_models import KEYS, tiny_folder

LENGTHS = [17, 1, 30, 12]


@pytest.fixture(scope="module")
def ranks():
    yield initialize(ParallelConfig(), 1)
    finalize()


def packed_row(vocab_size: int):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, vocab_size, (1, sum(LENGTHS)), generator=generator)
    labels = torch.randint(3, vocab_size, (1, sum(LENGTHS)), generator=generator)
    mask = (torch.rand(1, sum(LENGTHS), generator=generator) < 0.6).float()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return tokens, labels, mask, positions, packed_seq_params(offsets, max(LENGTHS))


def hf_logits(model, tokens):
    return torch.cat([model(part, use_cache=False).logits for part in tokens.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("name", KEYS)
def test_family_equals_transformers(name, tmp_path, ranks):
    theirs = tiny_folder(name, tmp_path)
    model = model_config_from_hf(read_hf_config(tmp_path))
    model = dataclasses.replace(model, padded_vocab_size=model.vocab_size + 5)
    model.core.pop("moe_aux_loss_coeff", None)  # transformers adds it to the loss only when asked to
    if model.core.get("multi_latent_attention") and not builds_latent_attention(model.core.get("q_lora_rank")):
        with pytest.raises(ConfigError, match="DeepSeek-V2-Lite"):
            build_model(model, ParallelConfig(), TrainConfig())
        return
    chunk = build_model(model, ParallelConfig(), TrainConfig())[0]
    load_hf_weights([chunk], model, tmp_path, ranks)
    tokens, labels, mask, positions, packed = packed_row(model.vocab_size)

    expected = hf_logits(theirs, tokens)
    with torch.no_grad():
        logits = chunk(tokens, positions, None, packed_seq_params=packed)[..., : model.vocab_size]
    assert (logits - expected).abs().max() <= 1e-4

    losses = chunk(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=packed)
    reference = torch.nn.functional.cross_entropy(expected[0].float(), labels[0], reduction="none") * mask[0]
    assert (losses[0] - reference).abs().max() <= 1e-5
    losses.sum().backward()
    reference.sum().backward()
    ours = chunk.embedding.word_embeddings.weight.grad[: model.vocab_size]
    wanted = theirs.get_input_embeddings().weight.grad
    assert (ours - wanted).norm() <= 1e-4 * wanted.norm()
