"""Tokens and masks of real template families, token by token, against the oracle of chat_families.py."""

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sft.config.run import DataConfig
from megatron_sft.data.chat import CONTENT_LEFT_OUT, ChatEncoder
from megatron_sft.data.fast_bpe import NoPlaces, Tokens
from megatron_sft.data.mask_gate import check_masks
from megatron_sft.data.schema import Row, RowError, to_row
from megatron_sft.data.tokens import Portion, encode_rows
from megatron_sft.errors import ConfigError
from tests.unit.data.chat_cases import CONTENTS, conversations
from tests.unit.data.chat_families import FAMILIES, trained_pieces
from tests.unit.data.chat_oracle import Chat

SIMPLE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens with the family's special tokens and its real template."""
    family = FAMILIES[name]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*CONTENTS, "user\n\n\n system\n\n assistant\n\n", "<think>\n\n</think>\n\n model\n\n"] * 20
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.special])
    names = {"bos_token": family.bos, "eos_token": family.eos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **{key: text for key, text in names.items() if text})
    tokenizer.chat_template = family.text
    return tokenizer


def encoder_of(name: str, **policy: object) -> ChatEncoder:
    return ChatEncoder(tokenizer_of(name), DataConfig(tokenizer_model=name, **policy))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_is_masked_wrongly_and_every_end_token_is_trained(name: str) -> None:
    family, encoder, tokenizer = FAMILIES[name], encoder_of(name), tokenizer_of(name)
    compared = 0
    for messages in conversations(family.has_system):
        row = Row(messages, where="a:1")
        (encoded,), kwargs = encoder.encode(row), encoder.template_kwargs(messages, row)
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        trained = [on for piece, on in trained_pieces(family, text, Chat(messages, kwargs=kwargs)) for _ in piece]
        expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded.tokens.tolist() == expected["input_ids"]
        assert encoded.loss_mask.tolist() == [int(all(trained[a:b])) for a, b in expected["offset_mapping"]]
        ends = [b for (_, b), on in zip(expected["offset_mapping"], encoded.loss_mask, strict=True) if on]
        last_characters = [i + 1 for i, on in enumerate(trained) if on and (i + 1 == len(trained) or not trained[i + 1])]
        assert set(last_characters) <= set(ends), "an end-of-turn token is not trained"
        compared += 1
    assert compared >= 30
    rows = [Row(messages, where=f"a:{i}") for i, messages in enumerate(conversations(family.has_system))]
    assert sum(check_masks(encoder, rows).values()) == 32


def test_rows_together_are_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad rows of the template and of the tokenizer among good ones, in portions that are rendered two rows at a time."""
    encoder = encoder_of("qwen3")
    tokenise = encoder.tokenise

    def fails_on_bang(text: str) -> Tokens:
        if "!" in text:
            raise NoPlaces("!")
        return tokenise(text)

    encoder.tokenise = fails_on_bang
    said = ["one", "bang!", "", "two", "three", "bang!", "four"]
    records = [
        (f"a:{number}", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": word}]})
        for number, word in enumerate(said)
    ]
    records.insert(3, ("a:b", {"messages": []}))
    alone = [encode_rows(encoder, encoder.config, Portion(0, [record])) for record in records]
    monkeypatch.setattr("megatron_sft.data.tokens.ROWS_TOGETHER", 2)
    together = encode_rows(encoder, encoder.config, Portion(0, records))
    for name in ("tokens", "loss_mask", "lengths"):
        assert np.array_equal(getattr(together, name), np.concatenate([getattr(result, name) for result in alone]))
    assert together.where == [where for result in alone for where in result.where]
    assert together.problems == [problem for result in alone for problem in result.problems]
    assert sum((Counter(result.counts) for result in alone), Counter()) == Counter(together.counts)
    assert [problem.where for problem in together.problems][:3] == ["a:1", "a:b", "a:5"]


def trained_text(encoder: ChatEncoder, row: Row) -> list[str]:
    return [encoder.tokenizer.decode(e.tokens[e.loss_mask > 0], clean_up_tokenization_spaces=False) for e in encoder.encode(row)]


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\nold\n</think>\n\nb"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "<think>\nnew\n</think>\n\nd"},
]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, ["b<|im_end|><think>\nnew\n</think>\n\nd<|im_end|>"]),
        ({"train_on": "last-turn"}, ["<think>\nnew\n</think>\n\nd<|im_end|>"]),
        ({"history_thinking": "expand"}, ["<think>\nold\n</think>\n\nb<|im_end|>", "<think>\nnew\n</think>\n\nd<|im_end|>"]),
        ({"history_thinking": "expand", "train_on": "last-turn"}, ["<think>\nnew\n</think>\n\nd<|im_end|>"]),
        ({"history_thinking": "drop"}, ["b<|im_end|><think>\nnew\n</think>\n\nd<|im_end|>"]),
    ],
)
def test_policies_on_qwen3(policy: dict[str, str], expected: list[str]) -> None:
    assert trained_text(encoder_of("qwen3", **policy), Row(CHAT, where="a:1")) == expected


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ("keep", "<think>\nold\n</think>\n\nb<|im_end|><think>\nnew\n</think>\n\nd<|im_end|>"),
        ("drop", "b<|im_end|><think>\nnew\n</think>\n\nd<|im_end|>"),
        ("mask", "b<|im_end|><think>\nnew\n</think>\n\nd<|im_end|>"),
    ],
)
def test_history_thinking_where_the_template_keeps_it(thinking: str, expected: str) -> None:
    encoder = encoder_of("qwen2_5", history_thinking=thinking)
    assert trained_text(encoder, Row(CHAT, where="a:1")) == [expected]
    whole = encoder.tokenizer.decode(encoder.encode(Row(CHAT, where="a:1"))[0].tokens)
    assert ("old" in whole) == (thinking != "drop"), "mask keeps the text, drop removes it"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_that_the_template_leaves_out_is_refused(key: str) -> None:
    messages = [CHAT[0], {"role": "assistant", "content": "b", key: "why"}]
    with pytest.raises(RowError, match=rf"a:1: the chat template leaves out {key} of message 2"):
        encoder_of("qwen2_5").encode(Row(messages, where="a:1"))


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_lone_surrogate_in_the_tools_is_refused(train_on: str) -> None:
    row = Row([CHAT[0], {"role": "assistant", "content": "b"}], [{"name": "\ud800"}], where="a:1")
    with pytest.raises(RowError, match=r"a:1: the text has a lone surrogate at character \d+"):
        encoder_of("qwen2_5", train_on=train_on).encode(row)


def test_train_on_all_trains_every_token() -> None:
    (encoded,) = encoder_of("qwen3", train_on="all").encode(Row(CHAT[:2], where="a:1"))
    assert encoded.loss_mask.all()


def test_weights_and_train_flags_of_messages() -> None:
    messages = [dict(message, content=word) for message, word in zip(CHAT, "abcd", strict=True)]
    messages[1]["train"], messages[3]["weight"] = False, 0.5
    encoder = encoder_of("qwen2_5")
    row = to_row({"messages": messages}, "a:1", encoder.config)
    (encoded,) = encoder.encode(row)
    assert encoded.loss_mask.dtype == np.float32
    assert sorted(set(encoded.loss_mask.tolist())) == [0.0, 0.5]
    assert trained_text(encoder, row) == ["d<|im_end|>"]


def test_tool_calls_can_be_left_untrained() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        CHAT[0],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    row = to_row({"messages": messages}, "a:1", DataConfig())
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert trained_text(encoder_of("qwen2_5"), row) == [called + "3<|im_end|>"]
    assert trained_text(encoder_of("qwen2_5", train_on_tool_calls=False), row) == ["3<|im_end|>"]


def test_plain_text_is_trained_whole_with_an_end_token() -> None:
    encoder = encoder_of("qwen2_5")
    (encoded,) = encoder.encode(to_row({"text": "Some text."}, "a:1", encoder.config))
    assert encoded.loss_mask.all()
    assert encoder.tokenizer.decode(encoded.tokens) == "Some text.<|im_end|>"


def test_the_end_token_is_trained_when_it_is_the_pad_token_too() -> None:
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.pad_token = tokenizer.eos_token
    (encoded,) = encoder_of("qwen2_5").encode(Row(CHAT[:2], where="a:1"))
    assert encoded.loss_mask[encoded.tokens == tokenizer.eos_token_id].tolist() == [0, 0, 1]


def test_a_row_that_the_template_refuses_is_a_row_error() -> None:
    row = Row([{"role": "system", "content": "s"}, *CHAT[:2]], where="a.jsonl:7")
    with pytest.raises(RowError, match=r"a.jsonl:7: the chat template refuses the conversation: System role not supported"):
        encoder_of("gemma").encode(row)


def test_tool_calls_that_a_template_leaves_out_are_a_row_error() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    row = Row([CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}], where="a.jsonl:7")
    with pytest.raises(RowError, match=r"a.jsonl:7: the chat template leaves out the tool call add"):
        encoder_of("phi3").encode(row)


WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}
ADD = {"type": "function", "function": {"name": "add"}}
FIRST_TOOL = "{% if tools %}{{ tools[0] | tojson }}{% endif %}"


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize(
    ("template", "said", "tools", "left_out"),
    [
        ("", "a", [WEATHER], "weather"),
        ("", "What is the weather?", [WEATHER], "weather"),
        ("", "a", [{"name": "s"}], "s"),
        (FIRST_TOOL, "a", [WEATHER, ADD], "add"),
        (FIRST_TOOL, "What is the weather?", [WEATHER], None),
    ],
)
def test_tools_that_a_template_leaves_out_are_a_row_error(
    template: str, said: str, tools: list[Any], left_out: str | None, train_on: str
) -> None:
    encoder = ChatEncoder(_with_template(template + SIMPLE), DataConfig(tokenizer_model="x", train_on=train_on))
    row = Row([{"role": "user", "content": said}, {"role": "assistant", "content": "b"}], tools, where="a.jsonl:7")
    if left_out is None:
        assert len(encoder.encode(row)) == 1
    else:
        with pytest.raises(RowError, match=rf"a.jsonl:7: the chat template leaves out the tool {left_out}; expected") as error:
            encoder.encode(row)
        assert error.value.reason == "tools left out"


@pytest.mark.parametrize(
    ("template", "count"),
    [
        ("{% for m in messages if m.role != 'system' %}", 1),
        ("{% for m in messages if m.role != 'tool' %}", 1),
        ("{% for m in messages %}{% set m = {'role': m.role, 'content': m.content[:5]} %}", 1),
        ("{% for m in messages %}{% set m = {'role': m.role, 'content': m.content | trim} %}", 0),
        ("{% for m in messages %}{% if m.role == 'tool' %}{{ m.content | tojson }}{% continue %}{% endif %}", 0),
    ],
)
def test_contents_that_a_template_leaves_out_are_counted(template: str, count: int) -> None:
    encoder = ChatEncoder(_with_template(SIMPLE.replace("{% for m in messages %}", template)), DataConfig(tokenizer_model="x"))
    said = [("system", "Be a helpful one. "), ("user", "a"), ("assistant", "b"), ("tool", 'Of "6"\n 7'), ("assistant", "c")]
    encoder.encode(Row([{"role": role, "content": content} for role, content in said], where="a:1"))
    assert encoder.notes == ({CONTENT_LEFT_OUT: count} if count else {})


def _with_template(text: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("qwen2_5").backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = text
    return tokenizer


def test_no_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"has no chat template; expected one"):
        ChatEncoder(_with_template(""), DataConfig(tokenizer_model="m"))
