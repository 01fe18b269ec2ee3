"""The user's tokenizer, and text -> tokens with exact character places also where Hugging Face gives none.

Not here: the fast path for byte-level BPE (fast_bpe.py), templates (templates.py).
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.fast_bpe import NoPlaces, Tokens
from megatron_sft.errors import ConfigError
from megatron_sft.files import regular, regular_folder


def load_tokenizer(config: DataConfig) -> Any:
    """The tokenizer of --tokenizer-model: an HF folder, a hub name, or a sentencepiece tokenizer.model.

    Raises:
        ConfigError: there is no tokenizer there, or no such template file.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    name = config.tokenizer_model
    tokenizer: Any
    try:
        if name.endswith(".model") and os.path.isfile(name):
            tokenizer = sentencepiece_tokenizer(name)
        else:
            if os.path.isdir(name):
                regular_folder(Path(name))
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, StrictDataclassError) as error:
        lines = 2 if isinstance(error, StrictDataclassError) else 1  # whose second one has the reason
        first_lines = " ".join(str(error).strip().split("\n")[:lines])[:300]
        raise ConfigError(
            [f"--tokenizer-model {name}: {first_lines} Expected an HF folder, a hub name or a sentencepiece tokenizer.model."]
        ) from None
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # what a training left in tokenizer.json; as transformers does
        backend.no_truncation()
        backend.no_padding()
    if config.chat_template:
        tokenizer.chat_template = template_text(config.chat_template)
    return tokenizer


def sentencepiece_tokenizer(path: str) -> Any:
    """HF's wrapper around a bare sentencepiece model, with the model's own names for begin, end and unknown."""
    import sentencepiece
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    model = sentencepiece.SentencePieceProcessor(model_file=path)
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id(), "pad_token": model.pad_id()}
    names = {name: model.id_to_piece(token) for name, token in ids.items() if token >= 0}
    return SentencePieceBackend(vocab_file=path, **names)


def template_text(given: str) -> str:
    """--chat-template: Jinja text, or a file that holds it."""
    if "{" in given:
        return given
    try:
        return regular(Path(given)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--chat-template {given}: {error}. Expected a file of Jinja text, or the text itself."]) from None


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Texts that the tokenizer turns into one token whatever stands around them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = {str(token) for token in [*tokenizer.all_special_tokens, *added.values()]}
    if model := getattr(tokenizer, "sp_model", None):  # user-defined symbols such as <|im_end|>
        pieces = {i: model.id_to_piece(i) for i in range(model.get_piece_size()) if not model.is_byte(i)}
        known |= {p for i, p in pieces.items() if p[:1] == "<" and p[-1:] == ">" and len(p) > 2 and i in model.encode(p)}
    return tuple(sorted(known - {""}))


class SlowText:
    """Text -> Tokens for tokenizers in Python, which give no character places.

    A sentencepiece model says them itself. Any other tokenizer must decode the first n tokens to a beginning of the text.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._model = getattr(tokenizer, "sp_model", None)
        added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        cut = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, cut))})") if cut else re.compile("(?!)")
        self._whole = frozenset(cut)

    def __call__(self, text: str) -> Tokens:
        """Tokens of the text.

        Raises:
            NoPlaces: as it says.
        """
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        place = 0
        for piece in (piece for piece in self._cut.split(text) if piece):
            own = self._tokenizer.encode(piece, add_special_tokens=False)
            edges = [(0, len(piece))] if piece in self._whole and len(own) == 1 else self._edges(piece, own)
            ids += own
            starts += [place + first for first, _ in edges]
            ends += [place + last for _, last in edges]
            place += len(piece)
        return Tokens(np.array(ids, np.int32), np.array(starts, np.int64), np.array(ends, np.int64))

    def _edges(self, piece: str, ids: list[int]) -> list[tuple[int, int]]:
        """(first character, one past the last) of each token of a piece of text."""
        if self._model is not None:
            pieces = self._model.encode(piece, return_type="proto").pieces
            if [part.id for part in pieces] == ids:
                return _character_edges(piece, [(part.begin, part.end) for part in pieces])
        ends = [len(self._decode(ids[: n + 1]).rstrip("\ufffd")) for n in range(len(ids))]
        if self._decode(ids) != piece or ends != sorted(ends):
            raise NoPlaces(
                f"the tokenizer gives no character places, and its tokens do not decode to the text {piece[:80]!r}; expected "
                "one of both, for exact masks. Take the family's fast tokenizer (tokenizer.json)."
            )
        return _own_edges(list(zip([0, *ends[:-1]], ends, strict=True)))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _character_edges(piece: str, edges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Places in UTF-8 bytes -> in characters: "\u00fca" with [(0, 2), (2, 3)] -> [(0, 1), (1, 2)]."""
    character_of = np.repeat(np.arange(len(piece)), [len(c.encode("utf-8", "surrogatepass")) for c in piece]).tolist() + [
        len(piece)
    ]
    return _own_edges([(character_of[first], character_of[last]) for first, last in edges])


def _own_edges(edges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Tokens that end no character (the first bytes of one) get the place of the token that does."""
    own: list[tuple[int, int]] = []
    following = (edges[-1][1], edges[-1][1]) if edges else (0, 0)
    for first, last in reversed(edges):
        following = (first, last) if first < last else following
        own.append(following)
    return own[::-1]
