"""generate.py in a terminal: typed, read and stopped as by a person."""

import json
from pathlib import Path

import pytest

from tests.functional.terminal import on_terminal
from tests.text_models import greedy


@pytest.mark.parametrize("processes", [1, 2])
def test_a_conversation_has_the_templates_own_turns(tiny_folder: Path, tmp_path: Path, processes: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "turns.jsonl"
    flags = ["--load", tiny_folder, "--osl", "150", "--output", output, "--tensor-model-parallel-size", processes]
    with on_terminal("generate.py", flags, processes) as screen:
        screen.until("> ")
        screen.type("Hi\r")
        first = screen.until("\n> ").partition("\n")[2]
        screen.type("one \\\r")
        screen.until(". ")
        screen.type("two\r")
        screen.until("> ")
        screen.type("/reset\r")
        screen.until("forgotten.\n> ")
        screen.type("Hi\r")
        assert screen.until("\n> ").partition("\n")[2] == first
        screen.type("Hi\r\x03")
        screen.until("[stopped]\n> ")
        screen.type("never sent\x03")
        screen.until("/exit or Ctrl-D ends")
        screen.until("> ")
        screen.type("\x04")
        assert screen.end() == 0, screen.plain
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    hi, two = [{"role": "user", "content": text} for text in ("Hi", "one \ntwo")]
    answers = [{"role": "assistant", "content": row["response"]} for row in rows]
    assert [row["messages"] for row in rows] == [[hi], [hi, answers[0], two], [hi], [hi, answers[2], hi]]
    assert [row["finish_reason"] == "cut" for row in rows] == [False, False, False, True]
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        assert row["prompt"] == prompt
        limit = 1 if row["finish_reason"] == "cut" else 150
        assert row["tokens"] == greedy(model, tokenizer(prompt)["input_ids"], limit, [257, 259])
