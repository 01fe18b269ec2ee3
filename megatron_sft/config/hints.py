"""What an unknown flag is answered. A hint never leads to a flag that turns something off unless the user asked for that."""

import difflib
import re
from collections.abc import Sequence

from megatron_sft.config import flags
from megatron_sft.config.elsewhere import ELSEWHERE

ISOLATION = ("--no-reset-attention-mask", "--no-reset-position-ids", "--no-eod-mask-loss")
"""Never suggested: without them documents see each other, or boundaries are trained."""


def nearest(word: str, known: Sequence[str]) -> str:
    """The one of some words that was probably meant; "" where none is near."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), "")


def hint(name: str, known: Sequence[str]) -> str:
    """The sentence about a flag that is in no table.

    Args:
        name: as it was typed, --no- included.
        known: flags that can be suggested.
    """
    if name in ELSEWHERE:
        return f"{name}: unknown flag. {ELSEWHERE[name]}"
    if name in flags.PROBLEMS:
        return f"{name}: {flags.PROBLEMS[name]}"
    for pattern, why in flags.REFUSED.items():
        if re.fullmatch(pattern, name.removeprefix("--no-").removeprefix("--")):
            return f"{name}: {why}"
    is_off = name.startswith("--no-")
    likely = [flag for flag in known if flag.startswith("--no-") == is_off and flag not in ISOLATION]
    near = max(likely, key=lambda flag: _likeness(name, flag), default="")
    suggestion = f"Did you mean {near}?" if near and _likeness(name, near) > 0.8 else "See --help."
    return f"{name}: unknown flag. {suggestion}"


def _likeness(typed: str, known: str) -> float:
    """0 to 1; 0 unless they have as many words, each of them near: --trian-iters is --train-iters, --lora-rank is not
    --q-lora-rank."""
    words = [name[2:].replace("_", "-").split("-") for name in (typed, known)]
    if "".join(words[0]) == "".join(words[1]):
        return 1.0
    if len(words[0]) != len(words[1]):
        return 0.0
    ratios = [difflib.SequenceMatcher(None, *pair).ratio() for pair in zip(*words, strict=True)]
    return sum(ratios) / len(ratios) if min(ratios) >= 0.6 else 0.0
