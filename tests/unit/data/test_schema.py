"""Every schema becomes the same messages; a value of any wrong kind is a RowError, never a traceback."""

import random
import re
from typing import Any

import pytest

from megatron_sft.config.run import DataConfig
from megatron_sft.data.json_rows import parse_line
from megatron_sft.data.schema import RowError, prompt_of, schema_of, to_row

ASKED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SYSTEM = [{"role": "system", "content": "s"}, *ASKED]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
ANTEATER = [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": ASKED}, ASKED),
        ({"messages": ASKED, "system": "s"}, SYSTEM),
        ({"conversation": ASKED}, ASKED),
        ({"conversations": SHAREGPT, "id": 1}, ASKED),
        ({"conversations": ANTEATER, "system": "s", "mask": "User"}, SYSTEM),  # Daring-Anteater
        ({"conversations": SHAREGPT, "instruction": "x", "response": "y"}, ASKED),  # Magpie
        ({"prompt": "x", "prompt_id": "1", "messages": ASKED}, ASKED),  # ultrachat_200k
        ({"id": "1", "system_prompt": "s", "question": "a", "response": "b"}, SYSTEM),  # OpenOrca
        ({"instruction": "a", "input": "", "output": "b"}, ASKED),
        ({"instruction": "a", "input": "c", "output": "b"}, [{"role": "user", "content": "a\nc"}, ASKED[1]]),
        ({"instruction": "a", "output": "b", "system": "s", "history": []}, SYSTEM),
        ({"instruction": "a", "context": "c", "response": "b"}, [{"role": "user", "content": "a\nc"}, ASKED[1]]),  # Dolly
        ({"instruction": "a", "input": "c", "response": "b"}, [{"role": "user", "content": "a\nc"}, ASKED[1]]),
        ({"messages": ASKED, "system": [{"type": "text", "text": "s"}]}, SYSTEM),
        ({"prompt": "a", "completion": "b"}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
        ({"problem": "a", "solution": "b"}, ASKED),
        ({"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]}, ASKED),
        ({"messages": [ASKED[0], {**ASKED[1], "tool_calls": None, "name": None}]}, ASKED),
        ({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, ASKED),
    ],
)
def test_schemas_become_the_same_messages(record: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert to_row(record, "f:1", DataConfig()).messages == expected


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"messages": SYSTEM, "system": "t"}, "message 1 and column system differ (['s', 't'])"),
        (
            {"conversations": [{"from": "system", "value": "s"}], "system_prompt": "t"},
            "message 1 and column system_prompt differ",
        ),
        ({"messages": ASKED, "system": "s", "system_prompt": "t"}, "column system and column system_prompt differ"),
        ({"prompt": SYSTEM[:2], "completion": "b", "system": "t"}, "message 1 and column system differ"),
        ({"messages": [{**ASKED[0], "value": "c"}, ASKED[1]]}, "content of message 1 and value of message 1 differ (['a', 'c'])"),
        ({"messages": [ASKED[0], {**ASKED[1], "train": True, "loss": 0}]}, "train of message 2 and loss of message 2 differ"),
        ({"messages": [ASKED[0], {**ASKED[1], "loss_scale": 1, "loss_weight": 2}]}, "loss_weight of message 2 and loss_scale of"),
    ],
)
def test_what_is_said_twice_in_two_ways_is_refused(record: dict[str, Any], told: str) -> None:
    with pytest.raises(RowError) as error:
        to_row(record, "f:1", DataConfig())
    assert error.value.reason == "said twice" and str(error.value).startswith(f"f:1: {told}")
    assert str(error.value).endswith("expected one value. Remove the others.")


def test_what_is_said_twice_in_one_way_counts_once() -> None:
    record = {
        "messages": [*SYSTEM[:2], {**ASKED[1], "value": "b", "train": True, "loss": 1}],
        "system": "s",
        "system_prompt": "s",
    }
    assert to_row(record, "f:1", DataConfig()).messages == [*SYSTEM[:2], {**ASKED[1], "train": True}]


def test_columns_can_be_named() -> None:
    config = DataConfig(prompt_key="q", response_key="r", prompt_dict_keys=("text",), response_dict_keys=("value",))
    record = {"q": {"text": "a"}, "r": [{"value": "b"}], "messages": 3}
    assert to_row(record, "f:1", config).messages == ASKED
    assert to_row({"chat": ASKED, "messages": []}, "f:1", DataConfig(input_key="chat")).messages == ASKED
    bot = {"messages": [ASKED[0], {"role": "bot", "content": "b"}]}
    assert to_row(bot, "f:1", DataConfig(role_map={"bot": "assistant"})).messages == ASKED


def test_tools_arguments_weights_and_template_kwargs_are_kept() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    record = {
        "messages": [
            ASKED[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {**ASKED[1], "loss": 0, "loss_weight": 0.5},
        ],
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
        "chat_template_kwargs": {"enable_thinking": False},
    }
    row = to_row(record, "f:1", DataConfig())
    parsed = {**call, "function": {"name": "f", "arguments": {"x": 1}}}
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [parsed]}
    assert row.messages[2] == {**ASKED[1], "train": False, "weight": 0.5}
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]
    assert row.template_kwargs == {"enable_thinking": False}


def test_a_schema_can_be_named() -> None:
    record = {"messages": [{"role": "assistant", "content": "a"}], "text": "t"}
    assert to_row(record, "f:1", DataConfig()).schema == "messages"
    assert to_row(record, "f:1", DataConfig(data_schema="text")).text == "t"
    with pytest.raises(RowError, match=r"f:1: no known schema .* expected those of --data-schema alpaca"):
        to_row(record, "f:1", DataConfig(data_schema="alpaca"))


def test_text_rows_have_no_messages() -> None:
    assert schema_of({"text": "t"}, DataConfig()) == "text"
    assert to_row({"text": "t"}, "f:1", DataConfig()).text == "t"


def test_an_error_says_where_what_expected_and_what_to_do() -> None:
    with pytest.raises(RowError) as error:
        to_row({"messages": [ASKED[0], {"role": "bot", "content": "b"}]}, "train.jsonl:17", DataConfig())
    assert str(error.value) == (
        "train.jsonl:17: message 2 has role 'bot'; expected system, user, assistant or tool. "
        "Rename it or pass --role-map bot=assistant."
    )
    assert error.value.reason == "unknown role"


BASES = [
    b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}',
    b'{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}],"tools":"[{}]"}',
    b'{"instruction":"a","input":"c","output":"b","history":[["a","b"]],"system":"s"}',
    b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{}"}}],'
    b'"train":true,"weight":0.5,"reasoning_content":"r"}],"chat_template_kwargs":{"a":1}}',
    b'{"prompt":[{"role":"user","content":"q"}],"completion":"x","system_prompt":"s"}',
    b'{"text":"t"}',
]
VALUES = [
    b"null",
    b"3",
    b"[]",
    b"{}",
    b'"x"',
    b"true",
    b"-1.5",
    b"[[]]",
    b"[{}]",
    b'"[1"',
    b'"{\\"a\\":1}"',
    b'"\\ud800"',
    b"1e400",
]


def mutated(random_state: random.Random) -> bytes:
    """A line with one value replaced, or some bytes changed, cut out or doubled."""
    line = bytearray(random_state.choice(BASES))
    if random_state.random() < 0.7:
        found = re.finditer(rb'"[^"]*"|[\d.]+|\[[^\[\]]*\]|\{[^{}]*\}', bytes(line))
        start, end = random_state.choice([m.span() for m in found])
        line[start:end] = random_state.choice(VALUES)
        return bytes(line)
    for _ in range(random_state.randint(1, 3)):
        place = random_state.randrange(len(line))
        new = bytes(random_state.randrange(256) for _ in range(random_state.randrange(3)))
        line[place : place + random_state.randrange(3)] = new
    return bytes(line)


def fuzz(num_lines: int, seed: int) -> tuple[int, int]:
    """(rows kept, rows refused) of mutated lines; any exception other than RowError comes through."""
    random_state, kept, refused = random.Random(seed), 0, 0
    for number in range(num_lines):
        try:
            to_row(parse_line(mutated(random_state), f"f:{number}"), f"f:{number}", DataConfig())
            kept += 1
        except RowError as error:
            assert str(error).startswith(f"f:{number}: ") and error.reason
            refused += 1
    return kept, refused


def test_mutated_lines_are_kept_or_refused_and_none_is_lost() -> None:
    kept, refused = fuzz(3000, seed=0)
    assert kept + refused == 3000 and kept > 100 and refused > 1000


QUESTION = {"role": "user", "content": "Why?"}
PROMPTED = {
    "messages": ({"messages": [QUESTION, {"role": "assistant", "content": "So."}]}, [QUESTION]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "system": "Be brief."},
        [{"role": "system", "content": "Be brief."}, QUESTION],
    ),
    "a list of messages as prompt": ({"prompt": [QUESTION]}, [QUESTION]),
    "pair": ({"question": "Why?", "answer": "So."}, [QUESTION]),
    "alpaca": (
        {"instruction": "Why?", "input": "", "output": "So.", "history": [["A", "B"]]},
        [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, QUESTION],
    ),
    "alpaca without an answer": ({"instruction": "Why?", "input": "Here."}, [{"role": "user", "content": "Why?\nHere."}]),
    "text": ({"text": "Why?"}, [QUESTION]),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}, [QUESTION]),
}


@pytest.mark.parametrize("name", PROMPTED)
def test_generation_asks_what_training_rows_ask(name: str) -> None:
    record, messages = PROMPTED[name]
    assert prompt_of(record, "here:1", DataConfig()).messages == messages


def test_a_prompt_has_the_columns_tools_and_template_arguments_of_its_row() -> None:
    config = DataConfig(prompt_key="extra_info", prompt_dict_keys=("question",), tool_key="functions")
    record = {
        "extra_info": '{"question": "Why?"}',
        "functions": '[{"name": "f"}]',
        "chat_template_kwargs": {"enable_thinking": False},
    }
    row = prompt_of(record, "here:1", config)
    assert (row.messages, row.tools, row.template_kwargs) == ([QUESTION], [{"name": "f"}], {"enable_thinking": False})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "So."}, "here:1: no prompt among the columns ['answer']; expected messages, conversations, prompt"),
        ({"messages": [{"role": "assistant", "content": "So."}]}, "here:1: no message before the assistant's"),
        ({"messages": [{"role": "bot", "content": "Why?"}]}, "here:1: message 1 has role 'bot'; expected system, user"),
        ([], "here:1: the row is a list; expected an object"),
    ],
)
def test_a_row_that_asks_nothing_is_named(record: Any, message: str) -> None:
    with pytest.raises(RowError, match=re.escape(message)):
        prompt_of(record, "here:1", DataConfig())


def test_dict_columns_may_be_json_text() -> None:
    """verl's extra_info, as a Parquet file without structs has it."""
    keys = {"prompt_key": "extra_info", "response_key": "extra_info", "prompt_dict_keys": ("question",)}
    config = DataConfig(**keys, response_dict_keys=("answer",))  # type: ignore[arg-type]
    row = to_row({"extra_info": '{"question": "Why?", "answer": "So."}'}, "here:1", config)
    assert [message["content"] for message in row.messages] == ["Why?", "So."]


@pytest.mark.parametrize(
    ("key", "words"),
    [("message", "There is no column 'message': did you mean --input-key messages?"), ("x", "Name the columns with --input-key")],
)
def test_a_wrong_input_key_is_answered_with_the_column_that_is_near(key: str, words: str) -> None:
    with pytest.raises(RowError, match=re.escape(words)):
        to_row({"messages": [QUESTION]}, "here:1", DataConfig(input_key=key))
