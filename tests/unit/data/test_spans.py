"""Masks of real template families against an oracle written by hand (chat_families.py)."""

import pytest

from megatron_sft.data.spans import Conversation, Undecided, assistant_spans
from megatron_sft.data.templates import Template, TemplateError
from tests.unit.data.chat_families import FAMILIES, TEMPLATES, conversations, plain_pieces


def _trained(pieces: list[tuple[str, bool]]) -> str:
    """The text with 1 for each trained character: [("ab", False), ("c", True)] -> "001"."""
    return "".join("01"[trained] * len(text) for text, trained in pieces)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_character_is_masked_wrongly(name: str) -> None:
    family = FAMILIES[name]
    template = Template(family.text, {"bos_token": family.bos, "eos_token": family.eos})
    decided, refused, undecided = 0, 0, []
    for messages in conversations(family.has_system):
        try:
            text, spans, route = assistant_spans(template, Conversation(messages, None, {}), family.special)
        except TemplateError:
            refused += 1
            continue
        except Undecided as reason:
            undecided.append((messages, str(reason)))
            continue
        pieces = plain_pieces(family, text, messages)
        assert "".join(piece for piece, _ in pieces) == text, (name, messages)
        mask = ["0"] * len(text)
        for first, last in spans:
            mask[first:last] = "1" * (last - first)
        assert "".join(mask) == _trained(pieces), (name, route, messages)
        decided += 1
    assert decided >= 30, (decided, refused, undecided)
    assert len(undecided) <= 4, undecided


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
    family = FAMILIES[name]
    template = Template(family.text, {"bos_token": family.bos, "eos_token": family.eos})
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


def test_an_end_token_inside_a_tool_call_is_refused_where_it_could_mislead() -> None:
    hostile = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
    chat = [TOOL_CHAT[0], {"role": "assistant", "content": "", "tool_calls": [hostile]}, *TOOL_CHAT[2:]]
    with pytest.raises(Undecided, match="a tool call contains the template's own"):
        _trained_texts("qwen3", chat, TOOLS)
    assert _trained_texts("qwen2_5", chat, TOOLS)[0].endswith('{"a": "<|im_end|>"}}\n</tool_call><|im_end|>')


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
