"""generate.py from the command line, as users start it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.text_models import greedy, text_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    text_model("llama", path)
    return path


def run(*flags: str, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "generate.py", *flags]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=180)


def test_prompts_from_a_file_to_jsonl(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts, output = tmp_path / "p.jsonl", tmp_path / "out" / "answers.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "left out"}]
    prompts.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": "Why?"}) + "\n")
    result = run("--load", str(folder), "--data", str(prompts), "--osl", "8", "--output", str(output))
    assert result.returncode == 0, result.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["messages"] for row in rows] == [turns[:1], [{"role": "user", "content": "Why?"}]]
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert row["tokens"] == greedy(model, ids, 8, [257, 259])
        assert row["response"] == tokenizer.decode(row["tokens"], skip_special_tokens=True)
    assert list(output.parent.iterdir()) == [output]


def test_prompts_from_standard_input_and_raw_text(folder: Path) -> None:
    result = run("--load", str(folder), "--osl", "4", "--no-chat-template", stdin="one\ntwo\n")
    assert result.returncode == 0, result.stderr
    assert "user: one" in result.stdout and "user: two" in result.stdout
    assert "reading prompts from standard input, one per line, to its end\n" in result.stderr


def test_a_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    result = run("--load", str(tmp_path), "--prompt", "Hi")
    assert result.returncode == 2
    assert "neither an HF folder" in result.stderr and "Traceback" not in result.stderr
