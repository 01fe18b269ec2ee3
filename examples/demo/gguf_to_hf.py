"""GGUF file of a Llama-family model -> Hugging Face folder in bf16. Only for `make demo`, whose model comes as GGUF.

    python examples/demo/gguf_to_hf.py MODEL.gguf FOLDER

Needs the gguf package (pip install gguf). Not a general converter: byte-level BPE with SmolLM's pre-tokenizer only.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
CONTROL_TOKEN = 3
"""gguf.TokenType.CONTROL"""


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    return f"{TOP[parts[0]]}.{parts[1]}"


def half_rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection from llama.cpp's interleaved RoPE order to HF's two halves.

    One head of width 4: rows [0, 2, 1, 3] -> [0, 1, 2, 3].
    Source: LlamaModel.permute in https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (its inverse).
    """
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, rows, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def read_weights(reader: GGUFReader, heads: int, groups: int) -> dict[str, torch.Tensor]:
    """HF names -> bf16 tensors."""
    weights = {}
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = half_rotated(weight, heads if ".attn_q." in tensor.name else groups)
        weights[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    return weights


def write_tokenizer(values: dict[str, Any], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE."""
    tokens, merges = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.merges"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = values["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[values["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[values["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[values["tokenizer.ggml.padding_token_id"]],
        "model_max_length": values["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": values["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def hf_config(values: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM."""
    hidden, heads = values["llama.embedding_length"], values["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": round(float(values["llama.attention.layer_norm_rms_epsilon"]), 8),
        "rope_theta": values["llama.rope.freq_base"],
        "max_position_embeddings": values["llama.context_length"],
        "vocab_size": len(weights["model.embed_tokens.weight"]),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
        "initializer_range": 0.02,
    }


def convert(path: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json; config.json comes last."""
    reader = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    if values["general.architecture"] != "llama":
        sys.exit(f"{path}: architecture {values['general.architecture']}; expected llama. Use a GGUF of a Llama model.")
    folder.mkdir(parents=True, exist_ok=True)
    heads, groups = values["llama.attention.head_count"], values["llama.attention.head_count_kv"]
    weights = read_weights(reader, heads, groups)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(values, folder)
    (folder / "config.json").write_text(json.dumps(hf_config(values, weights), indent=1))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
