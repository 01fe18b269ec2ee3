"""Special tokens inside what somebody says: where they stand, and tokens in which they are ordinary characters.

A template writes special tokens such as <|im_end|>; one in a user's text would be the same token, and so end his turn. For
`--special-in-content text` the tokenizer gets other names for its special tokens, which nobody can say; those that the template
wrote are put into the text by these names, and what is left of the old names is text like any other.

Worked example: "<u>a<e><e>" where the first <e> is the user's -> "{u}a<e>{e}" -> tokens {u}, "a", "<", "e", ">", {e}.
Not here: who wrote what (traced.py), the policy (chat.py).
"""

import json
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_sft.data.fast_bpe import HFText, TextTokenizer, Tokens
from megatron_sft.data.tokenizer import SlowText, sentencepiece_tokenizer, special_texts
from megatron_sft.data.traced import OWN
from megatron_sft.errors import ConfigError

SAID = frozenset(("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"))
"""What answers hold that are written as text, also where a tokenizer calls it special."""


def control_texts(tokenizer: Any) -> tuple[str, ...]:
    """Texts of the special tokens that no message should hold; the longest first.

    Tokens that were merely added to the vocabulary, such as <think> of Qwen3, are words like others.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    ordinary = {str(token) for token in added if not token.special} - set(tokenizer.all_special_tokens)
    return tuple(sorted(set(special_texts(tokenizer)) - ordinary - SAID, key=len, reverse=True))


def texts_in(value: Any) -> Iterator[str]:
    """Every text of a message or a list of tools, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from texts_in(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from texts_in(part)


class Literal:
    """Tokenises texts in which special tokens that the template did not write are ordinary characters.

    Args:
        control: control_texts of the tokenizer.
        tokenizer: with other names for them.
        tokenise: text -> Tokens by it; a faster one may be put in its place.
        names: special token -> its other name.
    """

    def __init__(self, control: Sequence[str], tokenizer: Any, tokenise: TextTokenizer, names: Mapping[str, str]):
        self._pattern = re.compile("|".join(map(re.escape, control)))
        self.tokenizer, self.tokenise, self._names = tokenizer, tokenise, names

    def __call__(self, text: str, authors: str) -> Tokens:
        """Tokens of a text, by the places of its own characters.

        Args:
            text: of c characters.
            authors: one a character (traced.py).
        """
        parts: list[str] = []
        places: list[np.ndarray] = []  # in `text`, of each character of what is tokenised
        done = 0
        for first, last in self._own(text, authors):
            name = self._names[text[first:last]]
            parts += [text[done:first], name]
            places += [np.arange(done, first), np.full(len(name), first)]
            done = last
        tokens = self.tokenise("".join([*parts, text[done:]]))
        origin = np.concatenate([*places, np.arange(done, len(text) + 1)])
        return Tokens(tokens.ids, origin[tokens.starts], origin[tokens.ends])

    def _own(self, text: str, authors: str) -> Iterator[tuple[int, int]]:
        """Where the template itself wrote a special token."""
        place = 0
        while match := self._pattern.search(text, place):
            is_own = not authors[match.start() : match.end()].strip(OWN)
            if is_own:
                yield match.span()
            place = match.end() if is_own else match.start() + 1


def literal_of(tokenizer: Any, name: str) -> Literal:
    """The Literal of a tokenizer.

    Args:
        tokenizer: from load_tokenizer.
        name: --tokenizer-model.

    Raises:
        ConfigError: its special tokens cannot get other names.
    """
    control, mark = control_texts(tokenizer), secrets.token_hex(8)
    names = {text: f"<{mark}-{number}>" for number, text in enumerate(control)}
    tokenise: TextTokenizer
    if tokenizer.is_fast:
        renamed = SimpleNamespace(backend_tokenizer=_renamed_fast(tokenizer, names))
        ids = {text: renamed.backend_tokenizer.token_to_id(other) for text, other in names.items()}
        tokenise = HFText(renamed)
    elif name.endswith(".model"):
        renamed = _renamed_sentencepiece(name, names)
        ids = {text: renamed.convert_tokens_to_ids(other) for text, other in names.items()}
        tokenise = SlowText(renamed)
    else:
        ids, renamed, tokenise = {}, None, SlowText(tokenizer)
    if not control or ids != {text: tokenizer.convert_tokens_to_ids(text) for text in control}:
        raise ConfigError(
            [
                f"{name}: --special-in-content text cannot tell its special tokens ({', '.join(control) or 'none'}) from text; "
                "expected a tokenizer.json or a sentencepiece tokenizer.model. Take such a one, or keep or error."
            ]
        )
    return Literal(control, renamed, tokenise, names)


def _renamed_fast(tokenizer: Any, names: Mapping[str, str]) -> Any:
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    for token in described["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): number for text, number in model["vocab"].items()}
    else:  # Unigram: pieces with their scores, by which it would find a name in a text
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    model["unk_token"] = names.get(model.get("unk_token"), model.get("unk_token"))
    return Tokenizer.from_str(json.dumps(described))


def _renamed_sentencepiece(path: str, names: Mapping[str, str]) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as descriptions

    made: Any = descriptions
    model = made.ModelProto.FromString(Path(path).read_bytes())
    for piece in model.pieces:
        piece.piece = names.get(piece.piece, piece.piece)
    for field in ("bos_piece", "eos_piece", "pad_piece", "unk_piece"):
        text = getattr(model.trainer_spec, field)
        setattr(model.trainer_spec, field, names.get(text, text))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tokenizer.model"
        place.write_bytes(model.SerializeToString())
        return sentencepiece_tokenizer(str(place))
