"""What the model will see: tokens with their masks and weights, and which documents share a pack; as text and as one page.

Shown is what stands in the token store, so what is trained on, not a second rendering. Not here: figures (report.py).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_sft.data.packing import PackPlan
from megatron_sft.data.store import Document, DocumentStore
from megatron_sft.log import printable
from megatron_sft.pages.markup import LEGEND, escaped, join, page, tag

Decode = Callable[[list[int]], str]
"""Token ids -> text, special tokens included."""

SHOWN_PACKS = 20
TRAINED, OTHER_WEIGHT, MASKED, PLAIN = "\x1b[30;42m", "\x1b[30;43m", "\x1b[2m", "\x1b[0m"
TRAINED_END = "\x1b[97;45m"
"""A special token that is trained, such as the end of a turn."""


def decoder(tokenizer: Any) -> Decode:
    """The tokenizer's own decoding, byte for byte: no clean-up of spaces, special tokens shown."""
    if model := getattr(tokenizer, "sp_model", None):
        return lambda ids: b"".join(_piece_bytes(tokenizer, model, token) for token in ids).decode("utf-8", "replace")
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _piece_bytes(tokenizer: Any, model: Any, token: int) -> bytes:
    """UTF-8 of one sentencepiece token: "<0xE4>" is that byte, "\u2581" a space."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if token < model.get_piece_size() and model.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def shown_documents(store: DocumentStore, count: int) -> list[int]:
    """The first `count` documents of each source."""
    sources = range(len(store.source_names))
    return [int(i) for source in sources for i in np.flatnonzero(store.source_ids == source)[:count]]


def pieces(document: Document, decode: Decode) -> Iterator[tuple[str, float, list[int]]]:
    """(text, weight, token ids) of each token; tokens that are a character only together come as one piece."""
    pending: list[int] = []
    for index, token in enumerate(document.tokens.tolist()):
        pending.append(token)
        text = decode(pending)
        weight = float(document.loss_mask[index])
        is_last = index + 1 == len(document.tokens) or float(document.loss_mask[index + 1]) != weight
        if is_last or len(pending) == 4 or not text.endswith("\ufffd"):
            yield text, weight, pending
            pending = []


def as_text(store: DocumentStore, plan: PackPlan, shown: Sequence[int], decode: Decode, is_coloured: bool) -> str:
    """Documents and packs for the terminal; without colours, trained text stands in [[ ]]."""
    out = []
    for index in shown:
        document = store.document(index)
        out += [
            printable(f"--- {_title(store, index, document)}"),
            _coloured(document, decode) if is_coloured else _bracketed(document, decode),
        ]
    out.append("--- packs (documents @ tokens)")
    for number in range(min(len(plan), SHOWN_PACKS)):
        lengths = store.lengths[plan[number]]
        out.append(f"{number}: {' | '.join(f'{i}@{n}' for i, n in zip(plan[number], lengths, strict=True))} = {lengths.sum()}")
    return "\n".join(out)


def sample_text(store: DocumentStore, index: int, decode: Decode, special: Collection[int], limit: int, is_coloured: bool) -> str:
    """One document, of a long one its first and last tokens, with a line that says what the colours mean.

    Args:
        store: of all documents.
        index: of this one.
        decode: token ids -> text.
        special: ids of the special tokens.
        limit: tokens that are shown.
        is_coloured: else trained text stands in [[ ]].
    """
    document = store.document(index)
    cut = len(document.tokens) - limit
    parts = [document]
    if cut > 0:
        ends = (slice(limit // 2), slice(len(document.tokens) - limit // 2, None))
        parts = [Document(document.tokens[end], document.loss_mask[end]) for end in ends]
    draw = (lambda part: _coloured(part, decode, special)) if is_coloured else (lambda part: _bracketed(part, decode))
    legend = f"{TRAINED}trained{PLAIN} {TRAINED_END}trained end{PLAIN} {MASKED}read{PLAIN}" if is_coloured else "[[trained]]"
    body = f"\n... {cut:,} tokens ...\n".join(map(draw, parts))
    return f"{printable(f'--- {_title(store, index, document)}')}   {legend}\n{body}\n---"


def as_html(store: DocumentStore, plan: PackPlan, shown: Sequence[int], decode: Decode, seq_length: int) -> str:
    """One self-contained page: no scripts, no requests."""
    rows = []
    for index in shown:
        document = store.document(index)
        spans = []
        for number, (piece, weight, ids) in enumerate(pieces(document, decode)):
            kind = ("m" if weight == 0 else "t" if weight == 1 else "o") + (" a" if number % 2 else "")
            spans.append(tag("span", piece, f'class="{kind}" title="{ids} weight {weight:g}"'))
        rows += [tag("h3", _title(store, index, document)), tag("pre", join(spans))]
    packs = []
    for number in range(min(len(plan), SHOWN_PACKS)):
        parts = ((100 * store.lengths[i] / seq_length, f"{store.where(int(i))}: {store.lengths[i]} tokens") for i in plan[number])
        bars = (tag("i", "", f'style="width:{share:.2f}%" title="{escaped(said)}"') for share, said in parts)
        packs.append(tag("div", join(bars), 'class="pack"'))
    hint = tag("p", "Every other token is underlined; hover for id and weight.", 'class="soft"')
    sections = [("Rows", join([LEGEND, hint, *rows])), (f"Packs of {seq_length:,} tokens", join(packs))]
    return page("Rows as they are trained", sections)


def trained_rows(store: DocumentStore, shown: Sequence[int], decode: Decode, limit: int) -> list[dict[str, Any]]:
    """JSON-able: title, and neighbouring text of one weight as runs of (text, weight); of a document its first `limit` tokens."""
    rows = []
    for index in shown:
        document = store.document(index)
        first = Document(document.tokens[:limit], document.loss_mask[:limit])
        rows.append({"title": _title(store, index, document), "runs": list(_runs(first, decode))})
    return rows


def _title(store: DocumentStore, index: int, document: Document) -> str:
    trained = int(np.count_nonzero(document.loss_mask))
    source = store.source_names[store.source_ids[index]]
    return f"{store.where(index)} ({source}, document {index}): {len(document.tokens)} tokens, {trained} trained"


def _runs(document: Document, decode: Decode) -> Iterator[tuple[str, float]]:
    """Neighbouring pieces of one weight as one text."""
    text, last = "", None
    for part, weight, _ in pieces(document, decode):
        if last is not None and weight != last:
            yield text, last
            text = ""
        text, last = text + part, weight
    if last is not None:
        yield text, last


def _coloured(document: Document, decode: Decode, special: Collection[int] = ()) -> str:
    """A line break outside its text's colour, which a terminal would draw to its edge."""
    out, last = [], ""
    for text, weight, tokens in pieces(document, decode):
        colour = MASKED if weight == 0 else TRAINED if weight == 1 else OTHER_WEIGHT
        colour = TRAINED_END if weight and tokens[0] in special else colour
        shown = printable(text).replace("\n", f"{PLAIN}\n{colour}")
        out.append(shown if colour == last else f"{PLAIN if last else ''}{colour}{shown}")
        last = colour
    return "".join([*out, PLAIN])


def _bracketed(document: Document, decode: Decode) -> str:
    marks = {0.0: ("", ""), 1.0: ("[[", "]]")}
    marked = [(*marks.get(weight, (f"[{weight:g}x[", "]]")), printable(text)) for text, weight in _runs(document, decode)]
    return "".join(f"{first}{text}{last}" for first, last, text in marked)
