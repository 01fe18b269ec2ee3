"""Text -> token ids and character offsets, with tiktoken where it gives the very ids of the Hugging Face tokenizer.

`text_tokenizer(tokenizer, samples)` reads the merges and the split pattern from tokenizer.json, compares on samples,
and falls back to the Hugging Face tokenizer with one log line when it is of another kind or any id or offset differs.

Why: on one core tiktoken makes 2-4 million tokens per second from the same merges, the tokenizers library 0.3-0.6.
Offsets come from the byte lengths of the tokens, so they cost one cumulative sum.
Not here: templates and masks (chat.py), processes (tokens.py).
"""

import importlib.util
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from megatron_sft.log import logger

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits(individual) before GPT-2's pattern: each number character alone, and white space before one stays in one piece.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
NO_BYTE = "\uffff"
HARD_TEXTS = (
    "",
    "I'll  say\r\n\r\n   it's 12345 tokens\t\tand\u00a0more ... ",
    "  12  345 a1b2 3\n\n\n 4",
    "caf\u00e9 na\u00efve \u4f60\u597d\uff0c\u4e16\u754c \U0001f600\u200d\U0001f525 \u0e2a\u0e27\u0e31\u0e2a",
    "def f(x):\n    return {'a': [1, 2], \"b\": None}  # done\n\n\n",
    "DON'T we'Re \u2019s \u00bd \u00b2 \u0661\u0662 _x_ --- <tag> \x00\x7f",
)


class Tokens(NamedTuple):
    """Of one text of c characters.

    Example: "h\u00e9" as byte tokens h, c3, a9 -> starts [0, 1, 1], ends [1, 2, 2].
    """

    ids: np.ndarray
    """int32 [n]."""
    starts: np.ndarray
    """int64 [n], 0..c: character in which a token begins."""
    ends: np.ndarray
    """int64 [n], 0..c: one past the character in which it ends."""


TextTokenizer = Callable[[str], Tokens]


def text_tokenizer(tokenizer: Any, samples: Iterable[str] = ()) -> TextTokenizer:
    """The fastest exact way to tokenise texts in which special tokens are written out; none are added.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        samples: rendered texts of the user's data that both ways must agree on.
    """
    slow = HFText(tokenizer)
    if importlib.util.find_spec("tiktoken") is None:
        logger.info("fast tokeniser: not used, tiktoken is not installed (pip install tiktoken)")
        return slow
    try:
        fast = BPEText(json.loads(tokenizer.backend_tokenizer.to_str()), slow)
    except UnsupportedTokenizer as reason:
        logger.info("fast tokeniser: not used, %s", reason)
        return slow
    for text in (*HARD_TEXTS, *fast.special_tokens, *samples):
        try:
            ours, theirs = fast(text), slow(text)
        except NoPlaces:
            continue  # its row is refused later
        if not all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            logger.info("fast tokeniser: not used, Hugging Face gives other tokens for %r", text[:80])
            return slow
    return fast


class NoPlaces(Exception):
    """The tokens of a text, or their places, cannot be told."""


class UnsupportedTokenizer(Exception):
    """The tokenizer is not byte-level BPE in a form that tiktoken can express."""


class HFText:
    """The Hugging Face tokenizer as a TextTokenizer."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer

    def __call__(self, text: str) -> Tokens:
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except BaseException as error:  # of tokenizers' Rust, for want of a better class: its regular expressions have limits
            if type(error).__name__ == "PanicException":
                raise NoPlaces(f"the tokenizer fails on it ({error}); expected text. Correct or remove the row.") from None
            raise
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return Tokens(np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])


class BPEText:
    """tiktoken with the merges of a tokenizer.json.

    Args:
        description: the parsed tokenizer.json.
        slow: takes the texts that this one must not (not normalised) or cannot (white space by the hundred thousand).

    Raises:
        UnsupportedTokenizer: tiktoken could give other ids.
    """

    def __init__(self, description: Mapping[str, Any], slow: TextTokenizer):
        import tiktoken

        self._slow = slow
        self._is_nfc = _is_nfc(description["normalizer"])
        model = description["model"]
        _check_model(model)
        added = _added_tokens(description["added_tokens"])
        self.special_tokens = tuple(added)
        ranks, ids = _ranks(model)
        self._unknown = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        specials = {content: len(ids) + i for i, content in enumerate(added)}
        self._ids = np.array([*ids, *added.values()], dtype=np.int32)
        pieces = [*ranks, *(content.encode() for content in added)]
        self._num_bytes = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._encoding = tiktoken.Encoding(
            "tokenizer.json",
            pat_str=_pattern(description["pre_tokenizer"]),
            mergeable_ranks=ranks,
            special_tokens=specials,
        )

    def __call__(self, text: str) -> Tokens:
        is_ascii = text.isascii()
        data = b"" if is_ascii and not self._unknown else text.encode()
        if self._unknown and len(data.translate(None, self._unknown)) < len(data):
            return self._slow(text)  # SmolLM2's vocabulary leaves out bytes of rare characters
        is_changed = self._is_nfc and not is_ascii and not unicodedata.is_normalized("NFC", text)
        if is_changed:
            return self._slow(text)
        try:
            ranks = self._encoding.encode_to_numpy(text, allowed_special="all")
        except ValueError:  # the stack of its regular expressions is exceeded
            return self._slow(text)
        num_bytes = self._num_bytes[ranks]
        ends = np.cumsum(num_bytes)
        starts = ends - num_bytes
        if not is_ascii:
            character_of = np.cumsum((np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80) - 1
            starts, ends = character_of[starts], character_of[ends - 1] + 1
        return Tokens(self._ids[ranks], starts, ends)


def _is_nfc(normalizer: Mapping[str, Any] | None) -> bool:
    if normalizer is not None and normalizer["type"] != "NFC":
        raise UnsupportedTokenizer(f"the tokenizer normalises text with {normalizer['type']}")
    return normalizer is not None


def _check_model(model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE":
        raise UnsupportedTokenizer(f"the tokenizer is {model['type']}, not byte-level BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk"):
        if model.get(key):
            raise UnsupportedTokenizer(f"the tokenizer's BPE has {key} {model[key]!r}")


def _added_tokens(added: list[dict[str, Any]]) -> dict[str, int]:
    """Content -> id of the tokens that are cut out of the text before the merges."""
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UnsupportedTokenizer(f"the added token {token['content']!r} takes in neighbouring text")
    contents = sorted(token["content"] for token in added)
    for first, second in itertools.pairwise(contents):
        if second.startswith(first):
            raise UnsupportedTokenizer(f"the added token {first!r} begins the added token {second!r}")
    return {token["content"]: token["id"] for token in added}


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The regular expression that splits text into the pieces that merges do not cross."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = tuple(part["type"] if part else None for part in parts)
    last = parts[-1] or {}
    if kinds[-1] == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ("ByteLevel",) and last["use_regex"]:
            return GPT2_PATTERN
        if kinds == ("Digits", "ByteLevel") and last["use_regex"] and parts[0]["individual_digits"]:
            return DIGITS_PATTERN
        if kinds == ("Split", "ByteLevel") and not last["use_regex"]:
            split = parts[0]
            if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
                return str(split["pattern"]["Regex"])
    raise UnsupportedTokenizer(f"the tokenizer splits text by {kinds}")


def _ranks(model: Mapping[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """tiktoken's table (bytes -> rank, in the order of the merges) and the id of each rank."""
    byte_of = _byte_of_character()
    table = dict.fromkeys(range(256), NO_BYTE) | {ord(shown): byte for shown, byte in byte_of.items()}
    vocabulary: Mapping[str, int] = model["vocab"]
    ranks: dict[bytes, int] = {}
    ids: list[int] = []
    merged = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    known = (token for token in byte_of if token in vocabulary)
    for token in (*known, *map("".join, merged)):
        try:
            piece = token.translate(table).encode("latin-1")
            identity = vocabulary[token]
        except (UnicodeEncodeError, KeyError):
            raise UnsupportedTokenizer(f"the token {token!r} is not made of bytes") from None
        if piece not in ranks:
            ranks[piece] = len(ids)
            ids.append(identity)
    return ranks, ids


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (github.com/openai/gpt-2: src/encoder.py, bytes_to_unicode), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table
