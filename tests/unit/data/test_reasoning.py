"""Reasoning of earlier answers, and empty <think> blocks that nobody wrote."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sft.data.chat import REASONING_LEFT_OUT, ChatEncoder
from megatron_sft.data.mask_gate import check_masks
from megatron_sft.data.report import as_table
from megatron_sft.data.schema import Row
from megatron_sft.data.tokens import build_memory_store
from tests.unit.data.test_chat import CHAT, _with_template, encoder_of, trained_text

PRESERVING = (
    "{% set last = namespace(i=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.i = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and (loop.index0 > last.i or "
    "(preserve_thinking is defined and preserve_thinking)) %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONED = [
    CHAT[0],
    {"role": "assistant", "content": "b", "reasoning_content": "old"},
    CHAT[2],
    {"role": "assistant", "content": "d", "reasoning_content": "new"},
]


@pytest.mark.parametrize("chat", [CHAT, REASONED])
@pytest.mark.parametrize(
    ("policy", "count"),
    [({}, 1), ({"history_thinking": "expand"}, 0), ({"history_thinking": "drop"}, 0), ({"train_on": "last-turn"}, 0)],
)
def test_reasoning_that_qwen3_leaves_out_is_counted_with_the_way_out(
    chat: list[dict[str, Any]], policy: dict[str, str], count: int
) -> None:
    encoder = encoder_of("qwen3", **policy)
    rows = [("a:1", {"messages": chat}), ("a:2", {"messages": chat[:2]})]
    source: Any = SimpleNamespace(name="a", num_rows=2)
    store = build_memory_store(encoder.config, [_Rows(rows, **vars(source))], encoder)
    assert store.ledger["a"]["notes"] == ({REASONING_LEFT_OUT: count} if count else {})
    notes = {"notes": store.ledger["a"]["notes"], "dropped": {}, "schemas": {}, "routes": {}}
    packing = {"packs": 1, "efficiency": 1.0, "documents_per_pack": 1.0}
    table = as_table({"sources": {}, "total": notes, "packing": packing, "seq_length": 9})
    assert ("reasoning left out: 1 rows; " in table and "--history-thinking expand trains" in table) == bool(count)


class _Rows(list):  # type: ignore[type-arg]
    """A source of rows in memory."""

    def __init__(self, rows: Any, name: str, num_rows: int):
        super().__init__(rows)
        self.name, self.num_rows = name, num_rows


@pytest.mark.parametrize("chat", [CHAT, REASONED])
def test_keep_keeps_where_a_template_argument_allows_it(chat: list[dict[str, Any]]) -> None:
    encoder = encoder_of("nemotron_3_nano")
    (text,) = trained_text(encoder, Row(chat, where="a:1"))
    assert text.index("old") < text.index("b<|im_end|>") < text.index("new") and not encoder.notes
    assert sum(check_masks(encoder, [Row(chat, where="a:1")]).values()) == 1
    (text,) = trained_text(encoder, Row(chat, None, {"truncate_history_thinking": True}, where="a:1"))
    assert "old" not in text and encoder.notes == {REASONING_LEFT_OUT: 1}, "the row's own argument counts"


def test_keep_says_preserve_thinking() -> None:
    tokenizer = _with_template(PRESERVING)
    encoder = ChatEncoder(tokenizer, encoder_of("qwen2_5").config)
    (text,) = trained_text(encoder, Row(REASONED, where="a:1"))
    assert text == "<think>old</think>b<|im_end|><think>new</think>d<|im_end|>"


@pytest.mark.parametrize(
    ("family", "block"),
    [("qwen3", "<think>\n\n</think>\n\n"), ("qwen3_training", "<think>\n\n</think>\n\n"), ("nemotron_3_nano", "<think></think>")],
)
@pytest.mark.parametrize("content", ["b", "\n b", "</think> is a tag"])
def test_an_empty_block_of_the_templates_own_is_trained_or_masked(family: str, block: str, content: str) -> None:
    row = Row([CHAT[0], {"role": "assistant", "content": content}], where="a:1")
    (trained,) = trained_text(encoder_of(family), row)
    encoder = encoder_of(family, empty_thinking="mask")
    (masked,) = trained_text(encoder, row)
    if content.startswith("</think>"):  # a template takes it for the end of reasoning: no block of its own is empty
        assert masked in (trained, trained.removeprefix(block))
        return
    assert trained == block + masked and masked.strip() == f"{content.strip()}<|im_end|>"
    assert sum(check_masks(encoder, [row]).values()) == 1


@pytest.mark.parametrize("family", ["qwen3", "nemotron_3_nano"])
def test_a_block_that_somebody_wrote_is_trained(family: str) -> None:
    row = Row([CHAT[0], {"role": "assistant", "content": "<think>\n\n</think>\n\nb"}], where="a:1")
    assert trained_text(encoder_of(family, empty_thinking="mask"), row) == trained_text(encoder_of(family), row)
    assert trained_text(encoder_of(family, empty_thinking="mask"), Row(CHAT, where="a:1")) == trained_text(
        encoder_of(family), Row(CHAT, where="a:1")
    )
