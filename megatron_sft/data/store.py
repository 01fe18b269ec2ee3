"""Tokenised documents: what a store offers, one in memory, one memory-mapped from a folder.

Not here: how the folder comes to be (tokens.py).

Folder (little-endian, no pickles):
    store.json            version, fingerprint, sizes, ledger, source names, loss weights, largest token id
    tokens.bin            int32, document after document
    loss_mask.bin         uint8 a token: an index into store.json's loss_weights ([0.0, 1.0, ...])
    lengths.npy           int32 [docs]
    source_ids.npy        int16 [docs]
    row_ids.npy           int64 [docs]: the row that each document comes from, counted over all sources
    where.bin             UTF-8 "file:line" of each document, one a line
    where_offsets.npy     int64 [docs + 1], bytes in where.bin
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_sft.errors import DataError

STORE_VERSION = 3


class Document(NamedTuple):
    tokens: np.ndarray
    """int32 [n]."""
    loss_mask: np.ndarray
    """uint8 [n] (0 or 1) or float32 [n] (weights); entry i says whether token i is trained (not shifted)."""


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
        source_ids: one a document; None: all 0.
        row_ids: one a document; None: each is a row of its own.
        where: one a document; None: `memory:1`, `memory:2` ...
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
    """A store in a folder, memory-mapped: opening costs milliseconds, processes share the pages.

    Raises:
        DataError: the folder is no store, is damaged, or is of another version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self._open()
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: no whole token store ({error}). Delete the folder; it is built again.") from None

    def _open(self) -> None:
        meta = self._read_meta()
        self.fingerprint: str = meta["fingerprint"]
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
        counts = [len(self.source_ids), len(self.row_ids), len(self._where_offsets) - 1]
        sizes = (*counts, meta["file_bytes"]["tokens.bin"] / 4)
        if sizes != (*[len(self)] * 3, self._offsets[-1]) or self.lengths.min(initial=0) < 0:
            raise ValueError(f"{len(self)} documents of {self._offsets[-1]} tokens, but sizes of {sizes}")
        empty = not len(self.lengths)
        self._tokens = np.zeros(0, np.int32) if empty else np.memmap(self.folder / "tokens.bin", np.int32, "r")
        self._codes = np.zeros(0, np.uint8) if empty else np.memmap(self.folder / "loss_mask.bin", np.uint8, "r")

    def _read_meta(self) -> dict[str, Any]:
        path = self.folder / "store.json"
        meta = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: (self.folder / name).stat().st_size for name in meta["file_bytes"]}
        if meta["version"] != STORE_VERSION or sizes != meta["file_bytes"]:
            raise DataError(
                f"{path}: version {meta['version']}, files of {sizes} bytes; expected version {STORE_VERSION} and "
                f"{meta['file_bytes']}. The store is damaged or of another release: delete the folder; it is built again."
            )
        return dict(meta)

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
