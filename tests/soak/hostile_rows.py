"""Rows that do whatever they like, each between two good ones: every one is a bad row at most, and all others are kept.

PYTHONPATH=. python tests/soak/hostile_rows.py [CHARACTERS]     of the long ones: 10,000,000 unless told
"""

import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sft.config.run import DataConfig
from megatron_sft.data.chat import ChatEncoder
from megatron_sft.data.sources import open_source
from megatron_sft.data.tokens import build_token_store
from tests.unit.data.chat_families import FAMILIES

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# Qwen's, and before it an expression of which the backtracking doubles with each tilde.
PATTERN = (
    r"(?:~|~~)+;|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = FAMILIES["qwen2_5"].text
BOMB = "{{ 'a'|center(2**31) }}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LONG_STEP = "{{ ([[0] * 10] * (999999 + messages|length)) | sum(start=[]) | length }}"
RECURSION = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}"


def encoder_of(template: str, **policy: Any) -> ChatEncoder:
    """Bytes as tokens, split as Qwen splits, and ChatML's special tokens."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_bytes_tokenizer(), eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, DataConfig(tokenizer_model="m", **policy))


@cache
def _bytes_tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    return tokenizer


OR_KEPT = " or kept"


def when(said: str, does: str) -> str:
    """A template that does something once a conversation's last message is of a kind, and ChatML always."""
    return f"{{% if messages[-1].content == '{said}' %}}{does}{{% endif %}}"


TEMPLATE = when("endless", ENDLESS) + when("bomb", BOMB) + when("recursion", RECURSION) + when("long step", LONG_STEP) + CHATML


def _deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def _called(arguments: Any, name: str = "f") -> dict[str, Any]:
    call = {"function": {"name": name, "arguments": arguments}}
    return {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}


def _said(answer: str) -> dict[str, Any]:
    return {"messages": [CHAT[0], {"role": "assistant", "content": answer}]}


def rows(size: int) -> dict[str, tuple[Any, str | None]]:
    """Name -> (record, why it is set aside; None: it is kept), with texts of up to `size` characters.

    "or kept" behind a reason: the time or the memory that one row may take is near, and either is right.
    """
    is_long = size >= 10**7  # then Qwen's expression exceeds the limits of its engine
    slow, large = ("takes too long or kept", "ended its process or kept") if is_long else (None, None)
    return {
        "no messages": ({"messages": []}, "no messages"),
        "nothing said": ({"messages": [{"role": role, "content": ""} for role in ("user", "assistant")]}, None),
        "spaces": (_said(" " * size), "no character places" if is_long else None),
        "spaces asked": (
            {"messages": [{"role": "user", "content": " " * size}, CHAT[1]]},
            "no character places" if is_long else None,
        ),
        "backtracking": (_said("~" * 60 + "x;"), "no character places"),
        "template arguments": ({"messages": CHAT, "chat_template_kwargs": _deep(900)}, "nested too deep"),
        "tools": ({"messages": CHAT, "tools": f"[{_deep(900)}]"}, "nested too deep"),
        "tool as text": ({"messages": CHAT, "tools": [_deep(900)]}, "nested too deep"),
        "arguments": (_called(_deep(900)), "nested too deep"),
        "deepest that is let in": (_called(json.loads(_deep(55))), None),
        "a huge number": (_called({"n": 10**4000}), None),
        "a huge number as text": (
            {"messages": CHAT, "chat_template_kwargs": f'{{"a": {"9" * 5000}}}'},
            "bad chat_template_kwargs",
        ),
        "a huge weight": ({"messages": [CHAT[0], {**CHAT[1], "weight": 10**400}]}, "bad weight"),
        "lone surrogate": (_said("\ud800"), "lone surrogate"),
        "lone surrogate in a name": (_called({}, "\udfff"), "lone surrogate"),
        "NUL": (_said("\0" * min(size, 10**6)), None),
        "marks": (_said("\x02from0123456789abcdef\x03" * (size // 100)), None),
        "many messages": ({"messages": CHAT * (size // 100)}, slow),
        "one word": (_said("a" * size), large),
        "digits": (_said("7" * size), large),
        "ends": (_said("<|im_end|>" * (size // 100)), None),
        "headers": (_said("<|im_start|>assistant\n" * (size // 100)), None),
        "thoughts": (_said("<think>" * (size // 100) + "</think>" * (size // 100)), None),
        "endless": (_said("endless"), "takes too long"),
        "long step": (_said("long step"), "ended its process"),
        "bomb": (_said("bomb"), "the template fails"),
        "recursion": (_said("recursion"), "the template fails"),
    }


def check(folder: Path, encoder: ChatEncoder, size: int) -> tuple[int, int]:
    """Builds a store in a folder from all of them; (kept, set aside) rows."""
    lines, expected = [], {}
    for record, reason in rows(size).values():
        lines += [record, {"messages": CHAT}]
        if reason:
            expected[len(lines) - 1] = reason
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(tokenizer_model="m", seq_length=64, truncation="left", num_workers=1, max_bad_rows=len(expected))
    store = build_token_store(config, [open_source(str(folder / "rows.jsonl"), config)], folder, lambda *_: encoder)
    problems = [json.loads(line) for line in (store.folder / "bad_rows.jsonl").read_text().splitlines()]
    found = {int(problem["where"].removeprefix(f"{folder}/rows.jsonl:")): problem["reason"] for problem in problems}
    wrong = {
        line: (found[line], expected.get(line)) for line in found if expected.get(line, "").removesuffix(OR_KEPT) != found[line]
    }
    wrong |= {line: (None, reason) for line, reason in expected.items() if line not in found and not reason.endswith(OR_KEPT)}
    assert not wrong, wrong
    kept = [line for line in range(1, len(lines) + 1) if line not in found]
    assert (store.row_ids + 1).tolist() == kept
    return len(kept), len(found)


def main(arguments: Sequence[str]) -> int:
    size = int(arguments[0]) if arguments else 10**7
    with tempfile.TemporaryDirectory() as folder:
        kept, aside = check(Path(folder), encoder_of(TEMPLATE), size)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{size:,} characters: {kept} rows kept, {aside} set aside, none lost; {used.ru_utime + used.ru_stime:.0f} s of processor"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
