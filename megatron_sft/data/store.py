"""Tokenised documents: what a store offers, one in memory, one memory-mapped from a folder.

Not here: how the folder comes to be (tokens.py).

Folder (little-endian, no pickles):
    store.json            version, fingerprint, ledger, source names, loss weights, largest token id, checksums of all files
    tokens.bin            int32, document after document
    loss_mask.bin         uint8 a token: an index into store.json's loss_weights ([0.0, 1.0, ...])
    lengths.npy           int32 [docs]
    source_ids.npy        int16 [docs]
    row_ids.npy           int64 [docs]: the row that each document comes from, counted over all sources
    where.bin             UTF-8 "file:line" of each document, one per line
    where_offsets.npy     int64 [docs + 1], bytes in where.bin
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_sft.errors import DataError

STORE_VERSION = 3
FILES = ("tokens.bin", "loss_mask.bin", "lengths.npy", "source_ids.npy", "row_ids.npy", "where.bin", "where_offsets.npy")
BLOCK_BYTES = 2**24
CHECK_THREADS = 4


class Document(NamedTuple):
    tokens: np.ndarray
    """int32 [n]."""
    loss_mask: np.ndarray
    """uint8 [n] (0 or 1) or float32 [n] (weights); entry i says whether token i is trained (not shifted)."""


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes store.json: `meta`, the checksums of the other files, and its own."""
    content = {"version": STORE_VERSION, **meta, "files": {name: _file_entry(folder / name) for name in FILES}}
    text = json.dumps({**content, "crc32": _meta_crc(content)}, indent=1)
    (folder / "store.json").write_text(text, encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of store.json, after its checksum and those of all files.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: no store of this version, or a damaged one.
    """
    meta = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    if meta["version"] != STORE_VERSION:
        raise ValueError(f"it has version {meta['version']!r}; expected {STORE_VERSION}")
    if meta.pop("crc32") != _meta_crc(meta):
        raise ValueError("store.json is damaged")
    for name in FILES:
        if _file_entry(folder / name) != meta["files"][name]:
            raise ValueError(f"{name} is damaged")
    return dict(meta)


def _meta_crc(meta: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def _content(meta: Mapping[str, Any]) -> str:
    """sha256, hex, of tokens, masks, documents, rows and sources; not of their names and places."""
    files = {name: meta["files"][name] for name in FILES if not name.startswith("where")}
    return hashlib.sha256(json.dumps([files, meta["loss_weights"]], sort_keys=True).encode()).hexdigest()


def _file_entry(path: Path) -> dict[str, Any]:
    """Its size, and the CRC-32 of every BLOCK_BYTES of it."""
    size = path.stat().st_size
    blocks = in_blocks(np.memmap(path, np.uint8, "r"), zlib.crc32) if size else []
    return {"bytes": size, "crc32": [f"{crc:08x}" for crc in blocks]}


def in_blocks(array: np.ndarray, function: Callable[[Any], Any]) -> list[Any]:
    """What `function` gives for each BLOCK_BYTES of an array, by several threads; it must release Python's lock."""
    step = BLOCK_BYTES // array.itemsize
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        return list(pool.map(function, [array[start : start + step] for start in range(0, len(array), step)]))


class DocumentStore(Protocol):
    """What packing, the data set and the report need of a store."""

    @property
    def lengths(self) -> np.ndarray:
        """int32 [docs]."""

    @property
    def source_ids(self) -> np.ndarray:
        """int16 [docs], indices into source_names."""

    @property
    def row_ids(self) -> np.ndarray:
        """int64 [docs], ascending: documents of one row (history_thinking, truncation) have the same number."""

    @property
    def source_names(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def ledger(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def document(self, index: int) -> Document: ...

    def where(self, index: int) -> str:
        """The row that the document comes from, `file:line`."""


class MemoryStore:
    """A store over arrays in memory, for tests and small data.

    Args:
        documents: (tokens, loss_mask) or objects with those two attributes, in order.
        source_ids: one per document; None: all 0.
        row_ids: one per document; None: each is a row of its own.
        where: one per document; None: `memory:1`, `memory:2` ...
    """

    def __init__(
        self,
        documents: Sequence[Any],
        source_ids: Sequence[int] | None = None,
        where: Sequence[str] | None = None,
        source_names: Sequence[str] = ("memory",),
        ledger: Mapping[str, Any] | None = None,
        fingerprint: str = "memory",
        row_ids: Sequence[int] | None = None,
    ):
        pairs = [d if isinstance(d, tuple) else (d.tokens, d.loss_mask) for d in documents]
        self._documents = [Document(np.asarray(tokens, dtype=np.int32), np.asarray(mask)) for tokens, mask in pairs]
        self.lengths = np.array([len(d.tokens) for d in self._documents], dtype=np.int32)
        self.source_ids = np.asarray(source_ids if source_ids is not None else [0] * len(pairs), dtype=np.int16)
        self.row_ids = np.asarray(row_ids if row_ids is not None else range(len(pairs)), dtype=np.int64)
        self.source_names = tuple(source_names)
        self.fingerprint = fingerprint
        self.ledger = dict(ledger or {})
        self._where = list(where) if where is not None else [f"memory:{i + 1}" for i in range(len(pairs))]

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, index: int) -> Document:
        return self._documents[index]

    def where(self, index: int) -> str:
        return self._where[index]


class TokenStore:
    """A store in a folder, memory-mapped: processes share the pages. Opening reads all of it once, for its checksums.

    Attributes:
        fingerprint: of what it was built from: files, tokenizer, flags, release.
        content: of what it holds for training; the same from copied files and from a release that encodes alike.

    Raises:
        DataError: the folder is no store, is damaged, or is of another version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self._open()
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{folder}: no whole token store ({error}); expected one as it was written. Delete the folder; it is built again."
            ) from None

    def _open(self) -> None:
        meta = read_meta(self.folder)
        self.fingerprint: str = meta["fingerprint"]
        self.content = _content(meta)
        self.source_names: tuple[str, ...] = tuple(meta["source_names"])
        self.ledger: Mapping[str, Any] = meta["ledger"]
        self.max_token_id = int(meta["max_token_id"])
        self.lengths = np.load(self.folder / "lengths.npy")
        self.source_ids = np.load(self.folder / "source_ids.npy")
        self.row_ids = np.load(self.folder / "row_ids.npy")
        self._where_offsets = np.load(self.folder / "where_offsets.npy", mmap_mode="r")
        self._weights = np.asarray(meta["loss_weights"], dtype=np.float32)
        self._offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=self._offsets[1:])
        self._tokens = np.memmap(self.folder / "tokens.bin", np.int32, "r")
        self._codes = np.memmap(self.folder / "loss_mask.bin", np.uint8, "r")
        wrong = [text for text, is_right in self._properties(meta["files"]["where.bin"]["bytes"]).items() if not is_right]
        if wrong:
            raise ValueError(f"of {len(self)} documents these do not hold: {', '.join(wrong)}")

    def _properties(self, where_bytes: int) -> dict[str, bool]:
        """What is so in every store; checksums do not tell when it was written wrong."""
        num_documents, num_tokens, weights = len(self.lengths), int(self._offsets[-1]), self._weights
        counted = {key: sum(entry[key] for entry in self.ledger.values()) for key in ("documents", "tokens", "trained_tokens")}
        trained = sum(in_blocks(self._codes, np.count_nonzero))
        sources, offsets = self.source_ids, self._where_offsets
        return {
            "one entry for each in every file": len(sources) == len(self.row_ids) == len(offsets) - 1 == num_documents > 0,
            "lengths from 1": int(self.lengths.min(initial=1)) > 0,
            "lengths that add up to tokens and masks": len(self._tokens) == len(self._codes) == num_tokens,
            "sources that have a name": bool((sources >= 0).all() and (sources < len(self.source_names)).all()),
            "ascending rows": bool((np.diff(self.row_ids, prepend=0) >= 0).all()),
            "ascending places": bool((np.diff(offsets) > 0).all() and offsets[0] == 0 and offsets[-1] == where_bytes),
            "weights from 0": weights[:2].tolist() == [0.0, 1.0] and bool((np.isfinite(weights) & (weights >= 0)).all()),
            "masks that have a weight": max(in_blocks(self._codes, np.max)) < len(weights),
            "token ids from 0 to the highest": max(in_blocks(self._tokens.view(np.uint32), np.max)) == self.max_token_id,
            "trained tokens": trained > 0,
            "the ledger's counts": list(counted.values()) == [num_documents, num_tokens, trained],
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> Document:
        start, end = self._offsets[index], self._offsets[index + 1]
        codes = self._codes[start:end]
        mask = codes if len(self._weights) == 2 else self._weights[codes]
        return Document(self._tokens[start:end], mask)

    def where(self, index: int) -> str:
        start, end = int(self._where_offsets[index]), int(self._where_offsets[index + 1])
        with open(self.folder / "where.bin", "rb") as file:
            file.seek(start)
            return file.read(end - start).decode("utf-8").rstrip("\n")
