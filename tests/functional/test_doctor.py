"""`megatron-sft doctor`: a healthy run has nothing, and each planted fault is named with its way out."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sft import shell
from megatron_sft.__main__ import main
from tests.text_models import TEMPLATE, byte_tokenizer

Change = Callable[[Path, dict[str, Any]], None]
"""(folder of the test, {flag: value}) -> None: plants a fault; `--load` and the rows are copies of its own."""


@pytest.fixture
def examine(tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the doctor on copies of model and rows; returns exit status and {check: [(outcome, text), ...]}."""

    def run(change: Change | None = None) -> tuple[int, dict[str, list[tuple[str, str]]]]:
        shutil.copytree(tiny_folder, tmp_path / "model")
        shutil.copy(rows_file, tmp_path / "rows.jsonl")
        flags: dict[str, Any] = {"--load": tmp_path / "model", "--finetune-hf-dataset": tmp_path / "rows.jsonl"}
        flags |= {"--seq-length": 256, "--save": tmp_path / "out"}
        if change:
            change(tmp_path, flags)
        status = main(["doctor", *(str(word) for pair in flags.items() for word in pair)])
        found: dict[str, list[tuple[str, str]]] = {}
        for line in capsys.readouterr().out.splitlines()[:-1]:
            outcome, name, text = re.split(" +", line, maxsplit=2)
            found.setdefault(name, []).append((outcome, text))
        return status, found

    return run


def no_template(place: Path, flags: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    shutil.rmtree(place / "model" / "chat_template.jinja", ignore_errors=True)
    place.joinpath("model", "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(place / "model")


def no_turn_end(place: Path, flags: dict[str, Any]) -> None:
    flags["--chat-template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


def template_fails(place: Path, flags: dict[str, Any]) -> None:
    flags["--chat-template"] = "{{ messages[0]['nothing']['at all'] }}"


def wrong_tokenizer(place: Path, flags: dict[str, Any]) -> None:
    byte_tokenizer().save_pretrained(place / "other")
    path = place / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocab, reversed(list(vocab.values())), strict=True))
    path.write_text(json.dumps(content))
    flags["--tokenizer-model"] = place / "other"


def larger_tokenizer(place: Path, flags: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["What is"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "model")


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Every row changed."""

    def plant(place: Path, flags: dict[str, Any]) -> None:
        path = place / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(f"{change(row)}\n" for row in rows))

    return plant


def all_masked(row: dict[str, Any]) -> str:
    return json.dumps({"messages": [{**message, "train": False} for message in row["messages"]]})


def odd_role(row: dict[str, Any]) -> str:
    return json.dumps({"messages": [{**message, "role": "bot"} for message in row["messages"]]})


def too_long(place: Path, flags: dict[str, Any]) -> None:
    flags["--seq-length"] = 60


def missing_data(place: Path, flags: dict[str, Any]) -> None:
    flags["--finetune-hf-dataset"] = place / "none.jsonl"


def missing_shard(place: Path, flags: dict[str, Any]) -> None:
    names = list(load_file(place / "model" / "model.safetensors"))
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shutil.move(place / "model" / "model.safetensors", place / "model" / files[0])
    index = {"metadata": {}, "weight_map": {name: files[name == names[-1]] for name in names}}
    place.joinpath("model", "model.safetensors.index.json").write_text(json.dumps(index))


def cut_weights(place: Path, flags: dict[str, Any]) -> None:
    path = place / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def nan_weights(place: Path, flags: dict[str, Any]) -> None:
    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path, {"format": "pt"})


def unknown_family(place: Path, flags: dict[str, Any]) -> None:
    path = place / "model" / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"lama"'))


def odd_heads(place: Path, flags: dict[str, Any]) -> None:
    flags |= {"--tensor-model-parallel-size": 3, "--processes": 3}


def flag(name: str, value: Any) -> Change:
    return lambda place, flags: flags.update({name: value})


FAULTS: dict[str, tuple[Change, str, str, str]] = {
    "no template": (no_template, "tokenizer", "the tokenizer has no chat template", "pass --chat-template FILE"),
    "no turn end": (no_turn_end, "rows|masks", "end", "--chat-template|template"),
    "template fails": (template_fails, "rows|masks", "template", "--chat-template|Correct"),
    "wrong tokenizer": (wrong_tokenizer, "tokenizer", "makes other tokens than the tokenizer of", "Leave --tokenizer-model"),
    "larger tokenizer": (larger_tokenizer, "rows", "vocabulary ends at 259", "pass its folder as --tokenizer-model"),
    "all masked": (rewritten(all_masked), "rows", "23 of the first 23 rows: no trained token", "Check the roles"),
    "odd role": (rewritten(odd_role), "rows", "23 of the first 23 rows are bad", "--role-map bot="),
    "no JSON": (rewritten(lambda row: "{"), "rows", "23 of the first 23 rows are bad", "--max-bad-rows"),
    "too long": (too_long, "rows", r"\d+ of the first 23 rows are longer than --seq-length 60", "--truncation split"),
    "missing data": (missing_data, "rows", "none.jsonl", "Check|Correct"),
    "missing shard": (missing_shard, "weights", "model-00002-of-00002.safetensors", "[Dd]ownload"),
    "cut weights": (cut_weights, "weights", "model.safetensors", "[Dd]ownload"),
    "NaN": (nan_weights, "loss", "holds NaN or infinite values", "Download the folder again"),
    "unknown family": (unknown_family, "weights", "unknown model_type 'lama'", "expected one of|--importer"),
    "other layers": (flag("--num-layers", 5), "weights", "--num-layers", "leave|Leave|Correct|config.json"),
    "typing error": (flag("--trian-iters", 5), "flags", "--trian-iters: unknown flag", "Did you mean --train-iters"),
    "impossible layout": (flag("--tensor-model-parallel-size", 3), "flags", "cannot be cut into TP 3", "change --tensor-"),
    "odd heads": (odd_heads, "layout", "--tensor-model-parallel-size 3 does not divide --num-attention-heads 4", "Choose one"),
    "too little memory": (flag("--gpu-memory", 0.01), "layout", "and has 0.0 GB", "megatron-sft plan CONF"),
    "no folder": (flag("--save", "/dev/null/out"), "flags", "/dev/null cannot be written", "Choose a folder that can"),
    "no cache folder": (
        flag("--data-cache-path", "/dev/null/x"),
        "disk",
        "/dev/null cannot be written",
        "Name a folder that can",
    ),
}


def test_a_healthy_run_has_nothing(examine: Any) -> None:
    status, found = examine()
    assert status == 0, found
    checks = ["flags", "packages", "devices", "weights", "tokenizer", "rows", "masks", "layout", "disk", "loss"]
    assert list(found) == checks and all(len(lines) == 1 and lines[0][0] == "ok" for lines in found.values()), found
    assert found["rows"][0][1].startswith("23 read, 23 documents")
    assert "a trained turn ends with" in found["masks"][0][1] and "<|end|>" in found["masks"][0][1]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_with_its_way_out(name: str, examine: Any) -> None:
    change, check, fault, way_out = FAULTS[name]
    status, found = examine(change)
    assert status == 1
    failed = [(place, text) for place, lines in found.items() for outcome, text in lines if outcome == "FAIL"]
    assert failed and re.fullmatch(check, failed[0][0]), found
    text = " ".join(text for place, text in failed if place == failed[0][0])
    assert re.search(fault, text) and re.search(way_out, text), failed


def test_a_full_disk_is_named(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, found = examine()
    assert status == 1
    ((outcome, text),) = found["disk"]
    assert outcome == "FAIL" and "0.0 GB free; expected" in text and "Free room, name another folder" in text


def test_a_conf_gives_the_flags_of_finetune_sh_and_the_number_of_processes(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == -I ]] && exec "{sys.executable}" "$@"\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script, variables = shell.SCRIPTS["doctor"]
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "TP": "2", "DP": "2", "LAUNCH_SCRIPT": "false"}
    environment |= dict(variable.split("=") for variable in variables)
    words = [shell.scripts() / f"{script}.sh", "Qwen/Qwen3-0.6B", "--lr", "1e-5"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert done[:5] == ["-m", "megatron_sft", "doctor", "--processes", "4"] and done[5].endswith("/finetune.py")
    assert done[done.index("--tensor-model-parallel-size") + 1] == "2" and done[-2:] == ["--lr", "1e-5"]
