"""Each character of a rendered text keeps its author; what loses him is nobody's, never the template's own."""

import random

import pytest

from megatron_sft.data.templates import Template
from megatron_sft.data.traced import FIRST_MESSAGE, NOBODY, OWN, Traced, author, authors_of, concat, signed
from tests.unit.data.chat_cases import hostile, own_pieces
from tests.unit.data.chat_families import FAMILIES


def shown(authors: str) -> str:
    """t: the template's own, 0 1 2: that message's, ?: nobody's."""
    return "".join({OWN: "t", NOBODY: "?"}.get(letter, str(ord(letter) - FIRST_MESSAGE)) for letter in authors)


def texts(rng: random.Random, count: int) -> list[Traced]:
    made = ("".join(rng.choice("ab \n</>") for _ in range(rng.randint(0, 6))) for _ in range(count))
    return [signed(text, author(number)) for number, text in enumerate(made)]


OPERATIONS = {
    "a + b": lambda a, b: a + b,
    "a + str": lambda a, b: a + str.__str__(b),
    "str + a": lambda a, b: str.__str__(b) + a,
    "strip": lambda a, b: a.strip(),
    "strip characters": lambda a, b: a.strip("ab"),
    "lstrip": lambda a, b: a.lstrip("\n"),
    "rstrip": lambda a, b: a.rstrip(),
    "slice": lambda a, b: a[1:4],
    "backwards": lambda a, b: a[::-1],
    "one character": lambda a, b: a[0] if a else a,
    "split": lambda a, b: a.split("</")[0],
    "split last": lambda a, b: a.split("a")[-1],
    "split by white space": lambda a, b: (a.split() or [a])[-1],
    "split once": lambda a, b: a.split("a", 1)[-1],
    "rsplit": lambda a, b: a.rsplit("a", 1)[0],
    "join": lambda a, b: a.join([b, "x", a]),
    "concat": lambda a, b: concat([a, "x", b]),
    "lower": lambda a, b: a.lower(),
    "replace": lambda a, b: a.replace("a", "b"),
    "format": lambda a, b: "%s" % a,  # noqa: UP031
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_character_is_its_authors_or_nobodys(operation: str) -> None:
    """The texts' characters are made unlike: where one is signed, its author wrote that very character."""
    rng = random.Random(operation)
    for _ in range(200):
        a, b = texts(rng, 2)
        plain = OPERATIONS[operation](str.__str__(a), str.__str__(b))
        found = OPERATIONS[operation](a, b)
        assert found == plain and hash(found) == hash(plain)
        assert len(authors_of(found)) == len(plain)
        marked_a, marked_b = (
            Traced("".join(chr(0xE000 + 64 * n + i) for i in range(len(t))), t._authors) for n, t in enumerate((a, b))
        )
        if operation in ("a + b", "slice", "backwards", "join", "concat"):
            moved = OPERATIONS[operation](marked_a, marked_b)
            for letter, by in zip(moved, authors_of(moved), strict=True):
                assert by == (author((ord(letter) - 0xE000) // 64) if letter != "x" else NOBODY)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ (m.content | trim) ~ '!' }}"
    "{% for c in m.calls %}{{ c | tojson }}{{ c.name }}{% endfor %}{{ loop.index }}{{ m.content | upper }}|{% endfor %}"
)


def test_who_wrote_what_of_a_conversation() -> None:
    messages = [
        {"role": "user", "content": " hi\n"},
        {"role": "assistant", "content": "!", "calls": [{"name": "f"}, {"n": 1}]},
    ]
    template = Template(TEMPLATE, {"bos_token": "<s>"})
    text, authors = template.trace(messages, None, {})
    assert text == template.render(messages)[0]
    assert text == '<s>[user]hi!1 HI\n|[assistant]!!{"name": "f"}f{"n": 1}2!|'
    assert (
        shown(authors)
        == "ttt" + "t" * 6 + "00t" + "?" + "????" + "t" + "t" * 11 + "1t" + "1" * 13 + "1" + "1" * 8 + "?" + "?" + "t"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_traced_render_gives_the_same_text(name: str) -> None:
    family = FAMILIES[name]
    template = Template(family.text, {"bos_token": family.bos, "eos_token": family.eos})
    conversation = hostile(family, own_pieces(family), random.Random(name))
    for messages in (conversation.messages, [{"role": "user", "content": "<b>'&"}, {"role": "assistant", "content": "\u00fc"}]):
        assert template.trace(messages, None, {})[0] == template.render(messages)[0]
