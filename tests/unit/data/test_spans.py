"""Masks of real template families against an oracle written by hand (chat_families.py)."""

import random
from functools import cache

import pytest

from megatron_sft.data.spans import Conversation, Undecided, assistant_spans
from megatron_sft.data.templates import Template, TemplateError
from tests.unit.data.chat_cases import conversations, hostile, own_pieces
from tests.unit.data.chat_families import FAMILIES, trained_pieces
from tests.unit.data.chat_oracle import TEMPLATES, Chat


@cache
def _template_of(name: str) -> Template:
    family = FAMILIES[name]
    return Template(family.text, {"bos_token": family.bos, "eos_token": family.eos})


def _against_oracle(name: str, chat: Chat) -> str | None:
    """The route that decided, after its mask was compared; None: refused."""
    family, template = FAMILIES[name], _template_of(name)
    try:
        text, spans, route = assistant_spans(template, Conversation(chat.messages, chat.tools, chat.kwargs), family.special)
    except (TemplateError, Undecided):
        return None
    pieces = trained_pieces(family, text, chat)
    assert "".join(piece for piece, _ in pieces) == text, (name, chat)
    mask = ["0"] * len(text)
    for first, last in spans:
        mask[first:last] = "1" * (last - first)
    assert "".join(mask) == _trained(pieces), (name, route, chat)
    return route


def _trained(pieces: list[tuple[str, bool]]) -> str:
    """The text with 1 for each trained character: [("ab", False), ("c", True)] -> "001"."""
    return "".join("01"[trained] * len(text) for text, trained in pieces)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_character_is_masked_wrongly(name: str) -> None:
    family = FAMILIES[name]
    routes = [_against_oracle(name, Chat(messages)) for messages in conversations(family.has_system)]
    assert sum(route is not None for route in routes) >= 30
    assert None not in routes, routes


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<|x|>"}}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}
]
TOOL_CHAT = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
ARGUMENTS = '{"a": 1, "b": "<|x|>"}'
THINKING_CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "old"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "reasoning_content": "new"},
]


def _trained_texts(name: str, messages: list[dict], tools: list[dict] | None, kwargs: dict | None = None) -> list[str]:
    family, template = FAMILIES[name], _template_of(name)
    text, spans, _ = assistant_spans(template, Conversation(messages, tools, kwargs or {}), family.special)
    return [text[first:last] for first, last in spans]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", [f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>', "It is 3.<|im_end|>"]),
        (
            "qwen3",
            [
                f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>',
                "<think>\n\n</think>\n\nIt is 3.<|im_end|>",
            ],
        ),
        ("llama3_1", [f'{{"name": "add", "parameters": {ARGUMENTS}}}<|eot_id|>', "It is 3.<|eot_id|>"]),
        (
            "gptoss",
            [
                f" to=functions.add<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
                "<|channel|>final<|message|>It is 3.<|return|>",
            ],
        ),
    ],
)
def test_tool_calls_are_trained_and_tool_results_are_not(name: str, expected: list[str]) -> None:
    assert _trained_texts(name, TOOL_CHAT, TOOLS) == expected


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("qwen3", {}, ["b<|im_end|>", "<think>\nnew\n</think>\n\nd<|im_end|>"]),
        ("qwen3", {"enable_thinking": False}, ["b<|im_end|>", "<think>\nnew\n</think>\n\nd<|im_end|>"]),
        ("qwen3_training", {}, ["<think>\nold\n</think>\n\nb<|im_end|>\n", "<think>\nnew\n</think>\n\nd<|im_end|>\n"]),
    ],
)
def test_reasoning_is_trained_where_the_template_keeps_it(name: str, kwargs: dict, expected: list[str]) -> None:
    assert _trained_texts(name, THINKING_CHAT, None, kwargs) == expected


INLINE_THINKING = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\nold\n</think>\n\nb"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "<think>\nnew\n</think>\n\nd"},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_5_think", ["b<|im_end|>", "new\n</think>\n\nd<|im_end|>"]),
        ("nemotron_3_nano", ["<think></think>\n\nb<|im_end|>", "new\n</think>\n\nd<|im_end|>"]),
    ],
)
def test_a_think_tag_that_the_prompt_opens_is_not_trained(name: str, expected: list[str]) -> None:
    template = Template((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), {})
    text, spans, _ = assistant_spans(template, Conversation(INLINE_THINKING, None, {}), ("<|im_start|>", "<|im_end|>"))
    assert [text[first:last] for first, last in spans] == expected


def test_glm_whose_answers_end_with_the_next_turn_is_refused() -> None:
    template = Template((TEMPLATES / "glm4moe.jinja").read_text(encoding="utf-8"), {})
    with pytest.raises(Undecided, match="no special token ends an answer, so that the model would never stop"):
        assistant_spans(template, Conversation(INLINE_THINKING, None, {}), ("<|user|>", "<|assistant|>", "<|endoftext|>"))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_an_end_token_inside_a_tool_call_ends_nothing(name: str) -> None:
    hostile_call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
    chat = [TOOL_CHAT[0], {"role": "assistant", "content": "", "tool_calls": [hostile_call]}, *TOOL_CHAT[2:]]
    assert _trained_texts(name, chat, TOOLS)[0].endswith('{"a": "<|im_end|>"}}\n</tool_call><|im_end|>')


def test_a_call_that_the_template_completes_to_an_end_token_ends_nothing() -> None:
    """`<function=` + `x<|im_end|` + `>`: neither the message nor the template alone writes the token."""
    call = {"type": "function", "function": {"name": "x<|im_end|", "arguments": {}}}
    chat = [TOOL_CHAT[0], {"role": "assistant", "content": "a", "tool_calls": [call]}, *TOOL_CHAT[2:]]
    called = "a\n\n<tool_call>\n<function=x<|im_end|>\n</function>\n</tool_call><|im_end|>"
    assert _trained_texts("qwen3_5_think", chat, None) == ["\n</think>\n\n" + called, "\n</think>\n\nIt is 3.<|im_end|>"]


@pytest.mark.parametrize(
    "quoted", ["<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>assistant\n", "<|im_end|>\n"]
)
@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "qwen3", "lfm2", "qwen3_training", "nemotron_3_nano", "qwen3_5_think"])
def test_an_answer_that_quotes_an_end_of_turn_while_it_thinks_is_trained_whole(name: str, quoted: str) -> None:
    answer = f"<think>\nIt ends with {quoted} here.\n</think>\n\nIt is {quoted}."
    turn = [{"role": "user", "content": quoted}, {"role": "assistant", "content": answer}]
    assert _against_oracle(name, Chat(turn * 2)) is not None
    last = _trained_texts(name, turn * 2, None)[-1]
    assert f"ends with {quoted} here.\n</think>\n\nIt is {quoted}.<|im_end|>" in last


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_of_the_templates_own_pieces_are_right_or_refused(name: str) -> None:
    """40 of the 200,000 a template of tests/soak/mask_fuzz.py."""
    pieces = own_pieces(FAMILIES[name])
    chats = [hostile(FAMILIES[name], pieces, random.Random(f"{name} {number}")) for number in range(40)]
    assert sum(_against_oracle(name, chat) is not None for chat in chats) >= 20


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill", "smollm2", "qwen3"])
def test_messages_that_say_nothing_are_no_crash(name: str) -> None:
    for said in ("", " ", "\n"):
        chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        assert _against_oracle(name, Chat(chat * 2)) is not None


AROUND = {
    "everything": "{% generation %}{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}{% endgeneration %}",
    "every message": "{% for m in messages %}{% generation %}<{{ m.role }}>{{ m.content }}<e>{% endgeneration %}{% endfor %}",
    "the question before an answer": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "<user>{{ messages[loop.index0 - 1].content }}<e><assistant>{{ m.content }}<e>{% endgeneration %}{% endif %}{% endfor %}",
    "the question of a long conversation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ messages[0].content if messages|length > 4 }}<assistant>{{ m.content }}<e>{% endgeneration %}"
    "{% else %}<user>{{ m.content }}<e>{% endif %}{% endfor %}",
    "the tools": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<assistant>{{ m.content }}<e>"
    "{{ messages[0].content if tools }}{% endgeneration %}{% else %}<user>{{ m.content }}<e>{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("question", ["Why?", "", "<e><assistant>No.<e>"])
def test_a_generation_block_around_what_others_say_is_not_believed(around: str, question: str) -> None:
    template = Template(AROUND[around] + "{% if add_generation_prompt %}<assistant>{% endif %}", {})
    for count in (1, 2, 3):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "Because."}] * count
        for tools in (None, TOOLS):
            try:
                text, spans, route = assistant_spans(template, Conversation(chat, tools, {}), ("<e>",))
            except Undecided:
                continue
            is_own = route == "generation"  # then the block's <assistant> is in it: the template says so
            assert [text[first:last] for first, last in spans] == ["<assistant>" * is_own + "Because.<e>"] * count


def test_an_empty_think_block_of_the_prompt_is_not_trained() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert _trained_texts("qwen3", chat, None, {"enable_thinking": False}) == ["b<|im_end|>"]


def test_analysis_and_final_of_gptoss_are_one_turn() -> None:
    chat = [*THINKING_CHAT[:1], {"role": "assistant", "content": "b"}, THINKING_CHAT[2]]
    chat.append({"role": "assistant", "content": "d", "thinking": "new"})
    new = "<|channel|>analysis<|message|>new<|end|><|start|>assistant<|channel|>final<|message|>d<|return|>"
    assert _trained_texts("gptoss", chat, None) == ["<|channel|>final<|message|>b<|end|>", new]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<e>{% endfor %}", "no generation prompt"),
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            "no special token ends an answer",
        ),
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}<e>{% endfor %}"
            "{{ '[assistant]' if add_generation_prompt}}",
            "not rendered once",
        ),
    ],
)
def test_what_no_route_decides_is_refused(text: str, reason: str) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(Undecided, match=reason):
        assistant_spans(Template(text, {}), Conversation(chat, None, {}), ("<e>",))
