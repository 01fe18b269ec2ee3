"""200,000 hostile conversations over every template in tests/assets: each mask is that of the hand-written oracle, or refused.

Contents (user, assistant, reasoning, tool calls, results, schemas, system) are made of the template's own pieces. The oracle
(tests/unit/data/chat_families.py) renders no Jinja and shares nothing with spans.py; what it writes must be the text too.

PYTHONPATH=. python tests/soak/mask_fuzz.py [CONVERSATIONS] [FIRST]     FIRST: number of the first one; a run can go on later
PYTHONPATH=. python tests/soak/mask_fuzz.py NAME NUMBER                 shows one conversation, what was found and expected
"""

import collections
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence

from megatron_sft.data.spans import Conversation, Undecided, assistant_spans
from megatron_sft.data.templates import Template, TemplateError
from tests.unit.data.chat_cases import hostile, own_pieces
from tests.unit.data.chat_families import FAMILIES, Family, trained_pieces
from tests.unit.data.chat_oracle import TEMPLATES, Chat

GLM = Family("glm4moe", lambda _: [], ("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>"))
"""Its answers end with the next turn's header: every conversation must be refused."""
ALL = {**FAMILIES, "glm4moe": GLM}
PART = 500
CRASHES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, MemoryError)


def verdict(family: Family, template: Template, chat: Chat) -> str:
    """right, refused (by the template), undecided: WHY, or WRONG: what."""
    try:
        conversation = Conversation(chat.messages, chat.tools or None, chat.kwargs)
        text, spans, route = assistant_spans(template, conversation, family.special)
    except TemplateError as error:
        return "CRASH" if error.is_fatal else "refused by the template"
    except CRASHES as error:
        return f"CRASH {type(error).__name__}: {error}"
    except Undecided as reason:
        return f"undecided: {str(reason).split(';')[-1]}"
    if family is GLM:
        return "WRONG: decided"
    pieces = trained_pieces(family, text, chat)
    ours = "".join(piece for piece, _ in pieces)
    if ours != text:
        same = next((i for i, (a, b) in enumerate(zip(ours, text, strict=False)) if a != b), min(len(ours), len(text)))
        return f"WRONG: the oracle writes {ours[same : same + 60]!r}, not {text[same : same + 60]!r} ({route})"
    expected = "".join("01"[trained] * len(piece) for piece, trained in pieces)
    found = ["0"] * len(text)
    for first, last in spans:
        found[first:last] = "1" * (last - first)
    if "".join(found) == expected:
        return f"right by {route}"
    place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"WRONG: by {route} at {text[place - 30 : place]!r} | {text[place : place + 30]!r}, expected {expected[place]}"


def part(job: tuple[str, int]) -> tuple[str, collections.Counter[str], list[str]]:
    """PART conversations of one template from a number on: verdicts, and how to see the wrong ones again."""
    name, first = job
    family = ALL[name]
    template = Template(family.text, {"bos_token": family.bos, "eos_token": family.eos})
    pieces = own_pieces(family)
    found: collections.Counter[str] = collections.Counter()
    wrong = []
    for number in range(first, first + PART):
        answer = verdict(family, template, hostile(family, pieces, random.Random(f"{name} {number}")))
        found[answer] += 1
        if answer.startswith(("WRONG", "CRASH")):
            wrong.append(f"{name} {number}: {answer}")
    return name, found, wrong


def show(name: str, number: int) -> int:
    family = ALL[name]
    chat = hostile(family, own_pieces(family), random.Random(f"{name} {number}"))
    print(*chat.messages, f"tools {chat.tools}", f"kwargs {chat.kwargs}", sep="\n")
    template = Template(family.text, {"bos_token": family.bos, "eos_token": family.eos})
    print(verdict(family, template, chat))
    return 0


def main(arguments: Sequence[str]) -> int:
    if arguments and not arguments[0].isdigit():
        return show(arguments[0], int(arguments[1]))
    count = int(arguments[0]) if arguments else 19_000
    start = int(arguments[1]) if len(arguments) > 1 else 0
    assert set(ALL) == {path.stem for path in TEMPLATES.glob("*.jinja")}, "a template has no oracle"
    each = -(-count // len(ALL) // PART) * PART
    jobs = [(name, first) for first in range(start, start + each, PART) for name in ALL]
    total: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in ALL}
    all_wrong, began = [], time.monotonic()
    with multiprocessing.get_context("fork").Pool() as pool:
        for name, found, wrong in pool.imap_unordered(part, jobs):
            total[name] += found
            all_wrong += wrong
            for line in wrong[:3]:
                print(line, flush=True)
    for name, found in total.items():
        parts = [
            sum(count for key, count in found.items() if key.startswith(kinds))
            for kinds in (("right",), ("refused",), ("undecided",), ("WRONG", "CRASH"))
        ]
        print("{:20} {:7} right {:6} refused by the template {:6} undecided {:5} wrong".format(name, *parts))
        for reason, number in found.most_common(8):
            print(f"    {number:7} {reason}")
    every = sum(sum(found.values()) for found in total.values())
    print(
        f"{every:,} conversations, {start}..{start + each} a template: {len(all_wrong)} wrong, {time.monotonic() - began:.0f} s"
    )
    return bool(all_wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
