"""Turns a GGUF file of a Llama-architecture model with a byte-level BPE tokenizer into a Hugging Face folder.

    python gguf_to_hf.py MODEL.gguf OUT_FOLDER

Steps: 1. tensors are dequantised, renamed and written as bf16 safetensors; 2. config.json and generation_config.json
from the metadata; 3. tokenizer.json and tokenizer_config.json, chat template included.
Not a general converter: other architectures and tokenizers are refused. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
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

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL, USER_DEFINED = 3, 4


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in TOP:
        return TOP[name]
    _, index, module, kind = name.split(".")
    return f"model.layers.{index}.{LAYER[module]}.{kind}"


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's row order of query and key, which interleaves the two halves that RoPE turns.

    One head of width 4: rows [0, 2, 1, 3] of the file become rows [0, 1, 2, 3].
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def metadata(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """Value of a metadata field, as Python."""
    return reader.fields[key].contents() if key in reader.fields else default


def weights(reader: GGUFReader, num_heads: int, num_query_groups: int) -> dict[str, torch.Tensor]:
    """All tensors under their Hugging Face names, bf16."""
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_freqs"):
            continue
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(tensor.shape.tolist()[::-1])
        if ".attn_q." in tensor.name:
            weight = unpermute(weight, num_heads)
        elif ".attn_k." in tensor.name:
            weight = unpermute(weight, num_query_groups)
        tensors[hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    return tensors


def config(reader: GGUFReader, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The model's config.json."""
    hidden_size = metadata(reader, "llama.embedding_length")
    num_heads = metadata(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": metadata(reader, "llama.feed_forward_length"),
        "num_hidden_layers": metadata(reader, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata(reader, "llama.attention.head_count_kv", num_heads),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # The file holds a float32: 9.999999747378752e-06 is 1e-05.
        "rms_norm_eps": round(float(metadata(reader, "llama.attention.layer_norm_rms_epsilon")), 8),
        "rope_theta": float(metadata(reader, "llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "max_position_embeddings": metadata(reader, "llama.context_length"),
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        **token_ids(reader),
    }


def token_ids(reader: GGUFReader) -> dict[str, int]:
    """bos, eos and pad token ids, those that the file names."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {name: metadata(reader, f"tokenizer.ggml.{key}") for name, key in names.items()}
    return {name: int(value) for name, value in found.items() if value is not None}


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """The byte-level BPE tokenizer; digits are split one by one before it (pre-tokenizer "smollm")."""
    kind, pre = metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise SystemExit(f"tokenizer {kind}/{pre}; expected gpt2/smollm, the only one that this converter knows.")
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges")]
    built = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    types = metadata(reader, "tokenizer.ggml.token_type")
    for token, kind in zip(tokens, types, strict=True):
        if kind == SPECIAL:
            built.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            built.add_tokens([AddedToken(token, special=False, normalized=False)])
    return built


def convert(source: Path, folder: Path) -> None:
    """Writes the Hugging Face folder, which must exist."""
    reader = GGUFReader(source)
    if metadata(reader, "general.architecture") != "llama":
        raise SystemExit(f"{source}: architecture {metadata(reader, 'general.architecture')}; expected llama.")
    num_heads = metadata(reader, "llama.attention.head_count")
    tensors = weights(reader, num_heads, metadata(reader, "llama.attention.head_count_kv", num_heads))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    tokens = metadata(reader, "tokenizer.ggml.tokens")
    ids = token_ids(reader)
    files = {
        "config.json": config(reader, tensors),
        "generation_config.json": {"_from_model_config": True, **ids},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name.removesuffix("_id"): tokens[index] for name, index in ids.items()},
            "model_max_length": metadata(reader, "llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": metadata(reader, "tokenizer.chat_template"),
        },
    }
    tokenizer(reader).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
