"""HF folders that cannot be used, through the command line: one message, a non-zero exit status, nothing written."""

import json
import os
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sft.__main__ import main
from megatron_sft.parallel import finalize
from tests.unit.hf.tiny_models import tiny_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    tiny_folder("qwen3", folder)
    return folder


def config(**changes):
    """Changes keys of config.json; ... takes one away."""

    def change(folder):
        keys = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({key: value for key, value in keys.items() if value is not ...}))

    return change


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def raw(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def header(length, content=b"{}"):
    return raw(lambda _: struct.pack("<Q", length) + content)


def weights(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return spoil


def renamed(name):
    return lambda folder: os.rename(folder / WEIGHTS, folder / name)


def in_three_files(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {name: f"model-{number % 3 + 1:05d}-of-00003.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def two_files_missing(folder):
    in_three_files(folder)
    for number in (1, 3):
        (folder / f"model-0000{number}-of-00003.safetensors").unlink()


def two_files_cut(folder):
    in_three_files(folder)
    for number in (1, 3):
        os.truncate(folder / f"model-0000{number}-of-00003.safetensors", 500)


def index(file):
    return text(INDEX, json.dumps({"weight_map": {"model.norm.weight": file}}))


def link_outside(folder):
    target = folder.parent / "elsewhere.safetensors"
    os.rename(folder / WEIGHTS, target)
    (folder / WEIGHTS).symlink_to(target)


def directory(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def pipe(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def adapter(folder):
    os.rename(folder / WEIGHTS, folder / "adapter_model.safetensors")
    os.rename(folder / "config.json", folder / "adapter_config.json")  # without what PEFT writes


def quantised(**keys):
    return config(quantization_config=keys)


ROPE = {"rope_parameters": ...}
DAMAGED = {  # found in the headers
    "cut": (raw(lambda data: data[: len(data) // 2]), "damaged or cut off"),
    "cut in the header": (raw(lambda data: data[:100]), "damaged or cut off"),
    "empty": (raw(lambda data: b""), "damaged or cut off"),
    "too long": (raw(lambda data: data + b"xx"), "damaged or cut off"),
    "endless header": (header(2**62), "damaged or cut off"),
    "header of 99 MB": (header(99 * 2**20), "damaged or cut off"),
    "no header": (header(4, b"abcd"), "damaged or cut off"),
    "a pointer of git lfs": (
        raw(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "damaged or cut off",
    ),
    "a folder": (directory(WEIGHTS), "damaged or cut off"),
    "a pipe": (pipe(WEIGHTS), "model.safetensors: no regular file; expected only files and folders"),
    "index a pipe": (pipe(INDEX), "index.json: no regular file"),
    "generation config a pipe": (pipe("generation_config.json"), "generation_config.json: no regular file"),
    "two files cut": (two_files_cut, "(?s)model-00001-of-00003.safetensors: damaged.*model-00003-of-00003.safetensors: damaged"),
    "two files missing": (two_files_missing, r"2 of 3 weight files are missing \(model-00001-of-00003.*Finish the download"),
    "index to another folder": (index("../other.safetensors"), "'../other.safetensors' lies outside the folder"),
    "index to a path": (index("/etc/passwd"), "'/etc/passwd' lies outside the folder"),
    "index to a null byte": (index("a\0b"), "lies outside the folder"),
    "index to a long name": (index("x" * 5000), "1 of 1 weight files are missing"),
    "index to nothing": (index("other.safetensors"), r"missing \(other.safetensors\)"),
    "index of other tensors": (index(WEIGHTS), "are in only one of the file and"),
    "index of other files": (
        lambda folder: (shutil.copyfile(folder / WEIGHTS, folder / "a.safetensors"), index("a.safetensors")(folder)),
        "has model.safetensors, and model.safetensors.index.json that does not name it; expected one of them",
    ),
    "index without map": (text(INDEX, "[]"), "not a safetensors index"),
    "index no JSON": (text(INDEX, "{"), "not a safetensors index"),
    "index a folder": (directory(INDEX), "not a safetensors index"),
    "link to another folder": (link_outside, "lies outside the folder"),
    "pickle": (renamed("pytorch_model.bin"), "Unpickling can run code"),
    "old pickle": (renamed("consolidated.00.pth"), "Unpickling can run code"),
    "gguf": (renamed("model-Q4_K_M.gguf"), r"there is model-Q4_K_M.gguf"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "expected the weights of a Hugging Face model"),
    "int8": (weights(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})), "has dtype I8"),
    "fp8": (weights(lambda t: t.update({"lm_head.weight": torch.ones(131, 64).to(torch.float8_e4m3fn)})), "has dtype F8_E4M3"),
    "fewer layers": (config(num_hidden_layers=2), "4 layers, numbered 0 to 3, not 2"),
    "more layers": (config(num_hidden_layers=5), "4 layers, numbered 0 to 3, not 5"),
    "vocabulary": (config(vocab_size=2**30), r"embed_tokens.weight has shape \[131, 64\], not \[1073741824, 64\]"),
}
CONFIGS = {  # found in config.json
    "no JSON": (text("config.json", "{'a': 1}"), "not JSON"),
    "deep JSON": (text("config.json", "[" * 100_000), "not JSON"),
    "a list": (text("config.json", "[1]"), "holds a JSON list"),
    "no model_type": (config(model_type=...), "unknown model_type 'None'"),
    "unknown": (config(model_type="falcon"), "unknown model_type 'falcon'; expected one of deepseek_v2, .*families.py"),
    "remote code": (
        config(model_type="own", auto_map={"AutoModel": "own.Own"}),
        "auto_map asks to run Python.*--trust-remote-code",
    ),
    "FP8 blocks": (quantised(quant_method="fp8"), "quantization_config of method 'fp8'.* Take the unquantised checkpoint"),
    "bitsandbytes": (
        quantised(quant_method="bitsandbytes", load_in_4bit=True),
        "of method 'bitsandbytes'.* save_pretrained writes",
    ),
    "GPTQ": (quantised(quant_method="gptq", bits=4), "quantization_config of method 'gptq'"),
    "all at once": (
        config(hidden_size="64", num_attention_heads=0, rms_norm_eps=None, attention_bias=True),
        "attention_bias is True; expected False; hidden_size is '64'; .*num_attention_heads is 0; expected a whole number",
    ),
    "no whole number": (config(num_hidden_layers=True), "num_hidden_layers is True; expected a whole number"),
    "negative": (config(num_hidden_layers=-1), "num_hidden_layers is -1; expected a whole number from 1 to 16384"),
    "layers without end": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; expected a whole number"),
    "text for a number": (config(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'; expected a number"),
    "text for a switch": (config(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'; expected true or false"),
    "a list for a name": (config(hidden_act=["silu"]), r"hidden_act is \['silu'\]; expected text"),
    "heads and groups": (config(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    "theta": (config(rope_theta="abc", **ROPE), r"rope_theta is 'abc'; expected a number from 1 to 1e\+12"),
    "negative theta": (config(rope_theta=-5, **ROPE), r"rope_theta is -5; expected a number from 1 to 1e\+12"),
    "unknown scaling": (config(rope_scaling={"type": "dynamic", "factor": 2.0}, **ROPE), "unknown rope_type 'dynamic'"),
    "scaling without factor": (config(rope_scaling={"type": "linear"}, **ROPE), "rope_scaling of type linear: factor is missing"),
    "half of Llama's scaling": (
        config(rope_scaling={"rope_type": "llama3", "factor": 8.0}, **ROPE),
        "low_freq_factor is missing",
    ),
    "text for a factor": (config(rope_scaling={"type": "linear", "factor": "x"}, **ROPE), "factor is 'x'; expected a number"),
    "layer types": (
        config(layer_types=["sliding_attention"], use_sliding_window=True, sliding_window=8),
        "does not name 4 layers",
    ),
    "kind of layer": (config(layer_types=["mamba"] * 4, use_sliding_window=True, sliding_window=8), "layer_types has mamba"),
    "no list of layers": (config(layer_types=3), "layer_types is 3; expected text"),
    "scaling a list": (config(rope_scaling=[1]), r"rope_scaling is \[1\]; expected an object"),
    "scale of a layer": (config(model_type="gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar is 0; expected a number"),
    "every 0th layer": (config(decoder_sparse_step=0), "decoder_sparse_step is 0; expected a whole"),
    "one expert": (
        config(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=1, norm_topk_prob=True, moe_intermediate_size=32),
        "num_experts_per_tok 1 with norm_topk_prob",
    ),
    "missing keys": (config(model_type="deepseek_v3"), "n_routed_experts is missing; "),
}
NO_FOLDER = {
    "adapter": (adapter, r"Expected a LoRA adapter of linear layers alone|neither an HF folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json|neither an HF folder"),
    "config a folder": (directory("config.json"), "no config.json|neither an HF folder"),
    "config a pipe": (pipe("config.json"), r"no config.json \(no regular file\)|neither an HF folder"),
    "nothing": (shutil.rmtree, "no config.json|neither an HF folder"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "no config.json|neither an HF folder"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "no config.json|neither an HF folder"),
}
MODELS = {  # found when the model's tensors are known
    "missing": (
        weights(lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        r"1 tensors missing \(first: model.layers.2.mlp.up",
    ),
    "extra": (
        weights(lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(128)})),
        r"1 tensors that the model does not have \(first: model.layers.1.self_attn.q_proj.bias\)",
    ),
    "shape and missing": (
        weights(lambda t: t.update({"model.norm.weight": torch.ones(63), "odd": t.pop("lm_head.weight")})),
        r"1 tensors missing \(first: lm_head.weight\); 1 tensors that .*odd\); model.norm.weight has shape \[63\], not \[64\]",
    ),
    "NaN": (weights(lambda t: t["model.norm.weight"][3].fill_(torch.nan)), "decoder.final_layernorm.weight holds NaN"),
}


@pytest.fixture
def refused(good, tmp_path, capsys):
    """refused(command, spoil, message): the command ends with status 2 and that message, and leaves the disk as it was."""

    def run(command, spoil, message):
        folder = tmp_path / "model"
        shutil.copytree(good, folder)
        spoil(folder)
        before = sorted(tmp_path.rglob("*"))
        words = {"load": ["--load", folder], "save": ["--save", tmp_path / "out"], "data": ["--train-data", "rows.jsonl"]}
        words["data"] += ["--tokenizer-model", folder]
        parts = {"convert": ("load", "save"), "conf": ("load",), "finetune": ("load", "save", "data"), "verify": ()}[command]
        flags = [folder] if command == "verify" else [word for part in parts for word in words[part]]
        assert main([command, *map(str, flags)]) == 2
        found = "".join(capsys.readouterr())  # conf's own output is the conf: what it says of itself goes to stderr
        assert re.search(message, found), found
        assert sorted(tmp_path.rglob("*")) == before
        if torch.distributed.is_initialized():
            finalize()

    return run


@pytest.mark.parametrize("command", ["convert", "verify", "finetune"])
@pytest.mark.parametrize("fault", DAMAGED)
def test_damaged_weights_are_refused_first(fault, command, refused):
    refused(command, *DAMAGED[fault])


@pytest.mark.parametrize("command", ["convert", "verify", "finetune", "conf"])
@pytest.mark.parametrize("fault", CONFIGS)
def test_wrong_config_is_refused_first(fault, command, refused):
    refused(command, *CONFIGS[fault])


@pytest.mark.parametrize("command", ["convert", "verify", "finetune"])
@pytest.mark.parametrize("fault", NO_FOLDER)
def test_what_is_no_folder_of_a_model_is_refused(fault, command, refused):
    refused(command, *NO_FOLDER[fault])


@pytest.mark.parametrize("fault", MODELS)
def test_wrong_tensors_are_refused_before_anything_is_written(fault, refused):
    refused("convert", *MODELS[fault])


def test_export_refuses_what_is_no_checkpoint(good, tmp_path, capsys):
    assert main(["export", "--load", str(good), "--save-hf", str(tmp_path / "out")]) == 2
    assert "no Megatron checkpoint; expected a folder with latest_checkpointed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
