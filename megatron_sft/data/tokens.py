"""Rows -> token store: several processes, streaming, cached on disk, whole or not there at all.

1. store_fingerprint: what the store depends on; a store of the same fingerprint is opened, nothing is tokenised.
2. One process builds (a file lock), the others wait for it without a time-out.
3. Rows are read here, rendered, tokenised, masked and cut to seq_length in worker processes, written here in order.
4. The ledger counts every row once: kept, truncated, split, or dropped by reason.
5. The folder is written under a temporary name, flushed to disk, then renamed: a killed build leaves nothing usable.

Not here: schemas (schema.py), templates and masks (chat.py), reading the folder (store.py), packs (packing.py).
"""

import dataclasses
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_sft.config.run import DataConfig
from megatron_sft.data.chat import ChatEncoder
from megatron_sft.data.fingerprint import Fingerprint, require_unchanged, store_fingerprint
from megatron_sft.data.limits import num_characters
from megatron_sft.data.mask_gate import CHECKED_ROWS, check_masks
from megatron_sft.data.schema import Row, RowError, to_row
from megatron_sft.data.store import Document, MemoryStore, TokenStore, write_meta
from megatron_sft.data.workers import LONG_TEXT, MakeEncoder, Portion, Problem, Result, in_order, make_encoder
from megatron_sft.errors import DataError
from megatron_sft.files import publish_folder
from megatron_sft.lock import if_free, only_one
from megatron_sft.log import logger

__all__ = ["TokenStore", "build_memory_store", "build_token_store", "encode_rows"]

NO_TRAINED_TOKEN = "no trained token"
TOO_LONG = "longer than seq_length"
HASHES = "hashes"
"""Folder beside the stores, for those of large files."""
PORTION_ROWS = 256
PORTION_CHARACTERS = 4 * 2**20
ROWS_TOGETHER = 64
"""Rows that are rendered before any of them is tokenised (chat.py:encode_all)."""
LISTED_PROBLEMS = 20
PROGRESS_S = 10.0


def build_token_store(
    config: DataConfig, sources: Sequence[Any], folder: str | Path, make: MakeEncoder = make_encoder
) -> TokenStore:
    """The token store of `sources`, from the cache in `folder` or built there now.

    Args:
        config: how rows become tokens.
        sources: sources.Source objects; their order is the order of documents.
        folder: of all cached stores; may be shared by processes and nodes.
        make: gives the encoder, from the configuration and the first rows of each source.

    Raises:
        DataError: more than max_bad_rows bad rows (the first 20 are listed), or no row left.
    """
    folder = Path(folder)
    before = store_fingerprint(config, sources, folder / HASHES)
    fingerprint = before.value
    damage = None
    try:
        if store := _whole(folder, fingerprint):  # the folder may be read-only
            hub = [source for source in sources if not source.files and not config.custom_dataset]
            if hub := [source.path for source in hub if source.commit() is None]:
                logger.info("tokens: %s as the hub had it then; to ask it again, delete that folder.", ", ".join(hub))
            return store
    except DataError as error:
        damage = error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder / f"{fingerprint[:32]}.lock", "the token store"):
            return _built(config, sources, before, folder, make)
    except OSError as error:
        if damage is None:
            raise
        raise DataError(f"{damage} That cannot be done now: {error}.") from None


def _built(config: DataConfig, sources: Sequence[Any], before: Fingerprint, folder: Path, make: MakeEncoder) -> TokenStore:
    """Builds the store, unless the process that had the lock before did it; this one has it now."""
    fingerprint = before.value
    name = folder / fingerprint[:32]
    temporary, aside = name.with_suffix(".building"), name.with_suffix(f".{os.getpid()}.building")
    _sweep(folder, fingerprint)
    try:
        if store := _whole(folder, fingerprint):
            return store
    except DataError as error:
        logger.warning("tokens: %s This is done now.", error)
    temporary.mkdir()
    try:
        _build(config, sources, fingerprint, temporary, make)
        require_unchanged(before, store_fingerprint(config, sources, folder / HASHES))
        publish_folder(temporary, name, aside)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return TokenStore(name)


def _sweep(folder: Path, fingerprint: str) -> None:
    """Removes what builds left that were killed: those whose lock nobody holds, and of `fingerprint`, whose lock is ours."""
    for left in folder.glob("*.building"):
        with if_free(folder / f"{left.name[:32]}.lock") as is_free:
            if is_free or left.name.startswith(fingerprint[:32]):
                shutil.rmtree(left, ignore_errors=True)


def _whole(folder: Path, fingerprint: str) -> TokenStore | None:
    """The store of that fingerprint; None: there is none. DataError: what is there cannot be used."""
    place = folder / fingerprint[:32]
    if not place.exists():
        return None
    store = TokenStore(place)
    if store.fingerprint != fingerprint:
        raise DataError(f"{place}: a store of other data ({store.fingerprint}); expected {fingerprint}. Delete the folder.")
    logger.info("tokens: %s documents from %s", f"{len(store):,}", place)
    return store


def build_memory_store(config: DataConfig, sources: Sequence[Any], encoder: Any) -> MemoryStore:
    """The same documents and ledger in memory, tokenised in this process."""
    collector = _Collector(config, [source.name for source in sources])
    documents: list[Document] = []
    where: list[str] = []
    names = list(collector.ledger)
    _check_masks(encoder, config, _first_rows(sources), names)
    for portion in _portions(sources):
        result = encode_rows(encoder, config, portion)
        collector.add(result)
        ends = np.cumsum(result.lengths)[:-1]
        pairs = zip(np.split(result.tokens, ends), np.split(result.loss_mask, ends), strict=True)
        documents += [Document(tokens, mask) for tokens, mask in pairs] if len(result.lengths) else []
        where += result.where
    collector.check(is_end=True)
    source_ids = np.concatenate(collector.source_ids).tolist()
    row_ids = np.concatenate(collector.row_ids).tolist()
    return MemoryStore(documents, source_ids, where, tuple(names), collector.ledger, row_ids=row_ids)


def encode_rows(encoder: Any, config: DataConfig, portion: Portion) -> Result:
    """Tokenises one portion of rows; bad rows are returned, not raised."""
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    rows_of: list[int] = []
    where_of: list[str] = []
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    routes, notes = getattr(encoder, "routes", Counter()), getattr(encoder, "notes", Counter())
    routes.clear()
    notes.clear()
    for number, ((where, record), samples) in enumerate(
        zip(portion.rows, _samples(encoder, config, portion, counts), strict=True)
    ):
        try:
            if isinstance(samples, RowError):
                raise samples
            documents, fate, lost = fit(samples, config.seq_length, config.truncation, where)
        except RowError as error:
            problems.append(Problem(where, error.reason, str(error), None if isinstance(record, RowError) else record))
            counts[f"dropped:{error.reason}"] += 1
            continue
        counts[fate] += 1
        counts["lost_tokens"] += lost
        for document in documents:
            tokens.append(document.tokens)
            masks.append(document.loss_mask)
            rows_of.append(number)
            where_of.append(where)
    counts.update({f"routes:{route}": count for route, count in routes.items()})
    counts.update({f"notes:{note}": count for note, count in notes.items()})
    return Result(
        source_id=portion.source_id,
        num_rows=len(portion.rows),
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]).astype(np.int32, copy=False),
        loss_mask=np.concatenate([np.zeros(0, np.uint8), *masks]),
        lengths=np.array([len(t) for t in tokens], dtype=np.int32),
        rows=np.array(rows_of, dtype=np.int64),
        where=where_of,
        counts=dict(counts),
        problems=problems,
    )


def _samples(encoder: Any, config: DataConfig, portion: Portion, counts: Counter[str]) -> Iterator[Sequence[Any] | RowError]:
    """Of each row what the encoder makes of it, or why it is a bad one."""
    for first in range(0, len(portion.rows), ROWS_TOGETHER):
        found: list[Row | RowError] = []
        for where, record in portion.rows[first : first + ROWS_TOGETHER]:
            try:
                found.append(to_row(record, where, config))
            except RowError as error:
                found.append(error)
        rows = [row for row in found if isinstance(row, Row)]
        counts.update(f"schemas:{row.schema}" for row in rows)
        encoded = iter(encoder.encode_all(rows) if isinstance(encoder, ChatEncoder) else _one_by_one(encoder, rows))
        yield from (next(encoded) if isinstance(row, Row) else row for row in found)


def _one_by_one(encoder: Any, rows: Sequence[Row]) -> Iterator[Sequence[Any] | RowError]:
    """By an encoder that is not ours."""
    for row in rows:
        try:
            yield encoder.encode(row)
        except RowError as error:
            yield error


def fit(samples: Sequence[Any], seq_length: int, truncation: str, where: str) -> tuple[list[Document], str, int]:
    """Cuts the samples of one row to seq_length.

    Args:
        samples: chat.Encoded of one row (several with history_thinking=expand).
        truncation: error, right (keep the beginning), left (keep the end), drop or split (pieces of seq_length).

    Returns:
        Documents that have a trained token; the row's fate (kept, truncated, split, dropped:REASON); tokens cut away.
    """
    documents: list[Document] = []
    fates: set[str] = set()
    lost = 0
    for sample in samples:
        tokens, mask = sample.tokens, sample.loss_mask
        pieces = [slice(0, len(tokens))]
        if len(tokens) > seq_length:
            pieces = _cuts(len(tokens), seq_length, truncation, where)
            fates.add({"drop": f"dropped:{TOO_LONG}", "split": "split"}.get(truncation, "truncated"))
        # The first token of a piece has nothing before it, so it cannot be trained.
        kept = [piece for piece in pieces if mask[piece][1:].any()]
        documents += [Document(tokens[piece], mask[piece]) for piece in kept]
        lost += len(tokens) - sum(piece.stop - piece.start for piece in kept)
    if not documents:
        return [], f"dropped:{TOO_LONG if fates == {f'dropped:{TOO_LONG}'} else NO_TRAINED_TOKEN}", lost
    # "truncated" also stands for a row that lost one of several samples to --truncation drop.
    return documents, "split" if "split" in fates else "truncated" if fates else "kept", lost


def _cuts(length: int, seq_length: int, truncation: str, where: str) -> list[slice]:
    """Pieces of an over-long document: 5 tokens at 2 -> right [0:2], left [3:5], split [0:2] [2:4] [4:5], drop none."""
    if truncation == "error":
        raise RowError(
            where,
            TOO_LONG,
            f"the row has {length:,} tokens; expected at most --seq-length {seq_length:,}. Raise --seq-length, or "
            "choose --truncation right, left, drop or split.",
        )
    if truncation == "right":
        return [slice(0, seq_length)]
    if truncation == "left":
        return [slice(length - seq_length, length)]
    if truncation == "split":
        return [slice(start, min(start + seq_length, length)) for start in range(0, length, seq_length)]
    assert truncation == "drop", f"unknown truncation {truncation!r}"
    return []


class _Collector:
    """Adds up results: the ledger, source and row ids, bad rows."""

    def __init__(self, config: DataConfig, names: Sequence[str]):
        self.config = config
        self.ledger: dict[str, dict[str, Any]] = {}
        for name in names:
            unique = name if name not in self.ledger else f"{name}#{len(self.ledger)}"
            zero = dict.fromkeys(("rows", "kept", "truncated", "split"), 0)
            tokens = dict.fromkeys(("documents", "tokens", "trained_tokens", "lost_tokens"), 0)
            self.ledger[unique] = {**zero, "dropped": {}, "schemas": {}, "routes": {}, "notes": {}, **tokens}
        self.source_ids: list[np.ndarray] = [np.zeros(0, dtype=np.int16)]
        self.row_ids: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self.problems: list[Problem] = []
        self.num_rows = 0
        self.max_token_id = -1

    def add(self, result: Result) -> None:
        entry = list(self.ledger.values())[result.source_id]
        entry["rows"] += result.num_rows
        entry["documents"] += len(result.lengths)
        entry["tokens"] += len(result.tokens)
        self.max_token_id = max(self.max_token_id, int(result.tokens.max(initial=-1)))
        entry["trained_tokens"] += int(np.count_nonzero(result.loss_mask))
        for key, count in result.counts.items():
            fate, _, reason = key.partition(":")
            if reason:
                entry[fate][reason] = entry[fate].get(reason, 0) + count
            else:
                entry[fate] += count
        self.source_ids.append(np.full(len(result.lengths), result.source_id, dtype=np.int16))
        self.row_ids.append(result.rows + self.num_rows)
        self.num_rows += result.num_rows
        self.problems += result.problems
        self.check(is_end=False)

    def check(self, is_end: bool) -> None:
        """Refuses the data when there are too many bad rows, or at the end when nothing is left."""
        allowed, bad = self.config.max_bad_rows, len(self.problems)
        if bad > allowed and (is_end or bad >= max(LISTED_PROBLEMS, allowed + 1)):
            listed = "\n  ".join(problem.message for problem in self.problems[:LISTED_PROBLEMS])
            raise DataError(
                f"{bad:,} bad rows among the first {self.num_rows:,}; expected at most {allowed:,}. Correct them, or "
                f"set them aside with --max-bad-rows N. The first:\n  {listed}"
            )
        if not is_end:
            return
        for name, entry in self.ledger.items():
            accounted = entry["kept"] + entry["truncated"] + entry["split"] + sum(entry["dropped"].values())
            assert accounted == entry["rows"], f"{name}: {accounted} rows accounted for of {entry['rows']}"
        if not sum(entry["documents"] for entry in self.ledger.values()):
            dropped: dict[str, int] = {}
            for entry in self.ledger.values():
                for reason, count in entry["dropped"].items():
                    dropped[reason] = dropped.get(reason, 0) + count
            fates = f" ({', '.join(f'{count:,} {reason}' for reason, count in dropped.items())})" if dropped else ""
            raise DataError(
                f"{', '.join(self.ledger)}: no row is left to train on of {self.num_rows:,}{fates}; expected at least one "
                f"conversation with a trained token. Check --seq-length {self.config.seq_length} and --truncation "
                f"{self.config.truncation} (what becomes of longer rows), the roles and --train-on."
            )


class _Writer:
    """Appends documents to the files of a store (store.py lists them)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tokens = open(folder / "tokens.bin", "wb")
        self._masks = open(folder / "loss_mask.bin", "wb")
        self._where = open(folder / "where.bin", "wb")
        self._lengths: list[np.ndarray] = [np.zeros(0, dtype=np.int32)]
        self._where_bytes: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self._weights = np.array([0.0, 1.0], dtype=np.float32)

    def write(self, result: Result) -> None:
        lines = [f"{where}\n".encode("utf-8", "backslashreplace") for where in result.where]
        self._where.write(b"".join(lines))
        self._where_bytes.append(np.array([len(line) for line in lines], dtype=np.int64))
        self._lengths.append(result.lengths)
        self._tokens.write(result.tokens.tobytes())
        self._masks.write(self._codes(result.loss_mask).tobytes())

    def _codes(self, mask: np.ndarray) -> np.ndarray:
        """Weights as indices into the table of distinct weights: 0.0 -> 0, 1.0 -> 1, 0.5 -> 2 ..."""
        if mask.dtype == np.uint8:
            return mask
        new = np.setdiff1d(mask, self._weights)
        self._weights = np.concatenate([self._weights, new.astype(np.float32)])
        if len(self._weights) > 256:
            raise DataError("the rows have more than 256 different message weights; expected a few. Round them.")
        order = np.argsort(self._weights)
        return order[np.searchsorted(self._weights, mask, sorter=order)].astype(np.uint8)

    def finish(self, collector: _Collector, fingerprint: str) -> None:
        for file in (self._tokens, self._masks, self._where):
            file.close()
        where_offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._where_bytes))]).astype(np.int64)
        np.save(self.folder / "lengths.npy", np.concatenate(self._lengths))
        np.save(self.folder / "source_ids.npy", np.concatenate(collector.source_ids))
        np.save(self.folder / "row_ids.npy", np.concatenate(collector.row_ids))
        np.save(self.folder / "where_offsets.npy", where_offsets)
        if collector.problems:
            lines = [json.dumps(dataclasses.asdict(problem), default=str) for problem in collector.problems]
            (self.folder / "bad_rows.jsonl").write_text("\n".join(lines) + "\n", encoding="ascii")
        meta = {
            "fingerprint": fingerprint,
            "source_names": list(collector.ledger),
            "ledger": collector.ledger,
            "max_token_id": collector.max_token_id,
            "loss_weights": self._weights.tolist(),
        }
        write_meta(self.folder, meta)

    def close(self) -> None:
        for file in (self._tokens, self._masks, self._where):
            file.close()


def _build(config: DataConfig, sources: Sequence[Any], fingerprint: str, folder: Path, make: MakeEncoder) -> None:
    collector = _Collector(config, [source.name for source in sources])
    writer = _Writer(folder)
    total_rows = _expected_rows(sources)
    start = last = time.monotonic()
    try:
        first = _first_rows(sources)
        encoder = make(config, first)
        _check_masks(encoder, config, first, list(collector.ledger))
        # disable=None: in a terminal a bar, elsewhere a line every PROGRESS_S
        with tqdm(desc="tokens", total=total_rows, unit=" rows", unit_scale=True, disable=None, leave=False) as bar:
            for result in in_order(_portions(sources), config, encoder, encode_rows):
                if result is not None:
                    collector.add(result)
                    writer.write(result)
                    bar.update(result.num_rows)
                if bar.disable and time.monotonic() - last >= PROGRESS_S:
                    last = time.monotonic()
                    _log_progress(collector, total_rows, last - start)
        collector.check(is_end=True)
        writer.finish(collector, fingerprint)
    finally:
        writer.close()
    tokens = sum(entry["tokens"] for entry in collector.ledger.values())
    elapsed = max(time.monotonic() - start, 1e-9)
    logger.info(
        "tokens: %s rows, %s tokens in %.1f s (%.2f Mtok/s)",
        f"{collector.num_rows:,}",
        f"{tokens:,}",
        elapsed,
        tokens / elapsed / 1e6,
    )


def _log_progress(collector: _Collector, total_rows: int | None, elapsed_s: float) -> None:
    rate = collector.num_rows / elapsed_s
    of_total = f" of {total_rows:,}" if total_rows else ""
    eta = f", ETA {max(total_rows - collector.num_rows, 0) / rate:.0f} s" if total_rows and rate else ""
    logger.info("tokens: %s%s rows, %s rows/s%s", f"{collector.num_rows:,}", of_total, f"{rate:,.0f}", eta)


def _expected_rows(sources: Sequence[Any]) -> int | None:
    """Rows to come, for the ETA: lines of plain JSONL files; None when it takes parsing to know."""
    total = 0
    for source in sources:
        if source.num_rows is not None:
            total += source.num_rows
            continue
        if not source.files or source.path not in (*source.files, *{os.path.dirname(f) for f in source.files}):
            return None
        for path in source.files:
            if not path.endswith((".jsonl", ".ndjson")):
                return None
            with open(path, "rb") as file:
                total += sum(block.count(b"\n") for block in iter(lambda f=file: f.read(2**22), b""))  # type: ignore[misc]
    return total


def _portions(sources: Iterable[Any]) -> Iterator[Portion]:
    """Rows of one source, PORTION_ROWS or about PORTION_CHARACTERS at a time: memory does not grow."""
    for source_id, source in enumerate(sources):
        rows: list[tuple[str, Any]] = []
        characters = 0
        for where, record in source:
            rows.append((where, record))
            characters += num_characters(record)
            if len(rows) >= PORTION_ROWS or characters >= PORTION_CHARACTERS:
                yield Portion(source_id, rows, characters)
                rows, characters = [], 0
        if rows:
            yield Portion(source_id, rows, characters)


def _first_rows(sources: Sequence[Any]) -> list[Portion]:
    return [Portion(index, list(itertools.islice(source, CHECKED_ROWS))) for index, source in enumerate(sources)]


def _check_masks(encoder: Any, config: DataConfig, first: Sequence[Portion], names: Sequence[str]) -> None:
    """Checks the masks of every source's first rows (mask_gate.py), so that wrong ones fail before any work."""
    if not isinstance(encoder, ChatEncoder):  # another one masks as it likes
        return
    for portion in first:
        rows = list(_good_rows(portion, config))
        routes = check_masks(encoder, rows)
        said = ", ".join(f"{count} by {route}" for route, count in routes.items()) or "plain text"
        if rows:  # otherwise encode_rows says what is wrong with them
            schemas = ", ".join(Counter(row.schema for row in rows))
            logger.info("rows: %s has %s; masks checked (%s)", names[portion.source_id], schemas, said)


def _good_rows(portion: Portion, config: DataConfig) -> Iterator[Row]:
    for where, record in portion.rows:
        try:
            row = to_row(record, where, config)
        except RowError:
            continue  # counted and reported by encode_rows
        if num_characters(record) < LONG_TEXT:
            yield row
