"""Tokenising processes. Not here: what is done to the rows (tokens.py: encode_rows)."""

import gc
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.fast_bpe import text_tokenizer
from megatron_sft.data.templates import TOO_LONG, limited_memory
from megatron_sft.errors import DataError, UserError

MEMORY_BYTES = 2**30
BYTES_PER_CHARACTER = 192
"""What a worker may allocate for a chunk: MEMORY_BYTES, more for rows of many megabytes. A template must not fill the machine."""
AHEAD_PER_WORKER = 4
"""Finished results that may wait for an earlier one, a worker."""
WAIT_S = 5.0
LONG_TEXT = 2**20
"""Characters; longer ones would take the checks before a build minutes."""


@dataclass(frozen=True)
class Chunk:
    source_id: int
    rows: Sequence[tuple[str, Any]]
    """(file:line, record or RowError)."""
    num_characters: int = 0


@dataclass(frozen=True)
class Problem:
    """A bad row, as it stands in bad_rows.jsonl."""

    where: str
    reason: str
    message: str
    record: Any


@dataclass(frozen=True)
class Result:
    """The documents of one chunk, one after another."""

    source_id: int
    num_rows: int
    tokens: np.ndarray
    """int32 [n]."""
    loss_mask: np.ndarray
    """uint8 or float32 [n]."""
    lengths: np.ndarray
    """int32 [documents]."""
    rows: np.ndarray
    """int64 [documents]: each one's row in the chunk, from 0."""
    where: list[str]
    counts: dict[str, int]
    """Rows by fate (kept, truncated, split, dropped:REASON), and lost_tokens."""
    problems: list[Problem]


Encode = Callable[[Any, DataConfig, Chunk], Result]
MakeEncoder = Callable[[DataConfig, Sequence[Chunk]], Any]


def in_order(chunks: Iterator[Chunk], config: DataConfig, encoder: Any, encode: Encode) -> Iterator[Result | None]:
    """Results of `encode(encoder, config, chunk)` in the order of the chunks; None when a few seconds brought none.

    Args:
        chunks: read only as fast as they are worked on.
        config: num_workers processes; 0: one a core.
        encoder: forked into each process: loading a tokenizer takes seconds, and 200 MB that are shared so.
        encode: what is done to a chunk.

    Raises:
        DataError: what a worker raised, or that a worker was killed.
    """
    num_workers = config.num_workers or len(os.sched_getaffinity(0))
    first = list(itertools.islice(chunks, num_workers))
    workers: list[_Worker] = []
    try:
        for _ in range(min(num_workers, len(first))):
            workers.append(_Worker(config, encoder, encode, [worker.connection for worker in workers]))
        yield from _deal(workers, itertools.chain(first, chunks))
    finally:
        for worker in workers:
            worker.close()


def make_encoder(config: DataConfig, sample: Sequence[Chunk]) -> Any:
    """The ChatEncoder of `config`; the fast tokeniser is checked on the sample's own texts before it is used."""
    from megatron_sft.data.chat import ChatEncoder, load_tokenizer

    with _without_collection():
        tokenizer = load_tokenizer(config)
        encoder = ChatEncoder(tokenizer, config)
        if getattr(tokenizer, "is_fast", False) and hasattr(encoder, "tokenise"):
            texts = (text for chunk in sample for _, record in chunk.rows[:16] for text in _strings(record))
            encoder.tokenise = text_tokenizer(tokenizer, [text for text in texts if len(text) < LONG_TEXT])
    return encoder


@contextmanager
def _without_collection() -> Iterator[None]:
    """Python's cyclic garbage collector off: a third of the time in which a tokenizer of 150,000 tokens loads is its."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.isprintable() or not any("\ud800" <= c <= "\udfff" for c in value):  # such a row is refused later
            yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


class _Worker:
    """One process, which has at most one chunk at a time: sending never waits for a process that waits for us."""

    def __init__(self, config: DataConfig, encoder: Any, encode: Encode, others: Sequence[Connection]):
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        ours = (*others, self.connection)
        self.process: ForkProcess = context.Process(target=_work, args=(theirs, ours, config, encoder, encode))
        self.process.start()
        theirs.close()
        self.index: int | None = None
        self.first_row = ""

    def give(self, index: int, chunk: Chunk) -> None:
        self.index, self.first_row = index, chunk.rows[0][0]
        try:
            self.connection.send(chunk)
        except OSError:
            raise self._dead() from None

    def take(self) -> tuple[int, Result]:
        assert self.index is not None, "only a worker that has a chunk gives a result"
        try:
            result = self.connection.recv()
        except (EOFError, OSError):
            raise self._dead() from None
        if isinstance(result, UserError):
            raise result
        index, self.index = self.index, None
        return index, result

    def _dead(self) -> DataError:
        self.process.join(WAIT_S)
        if self.process.exitcode == -signal.SIGPROF:
            return DataError(
                f"{self.first_row}: on this row, or one after it, the chat template {TOO_LONG}. Correct it, or pass another "
                "--chat-template."
            )
        return DataError(
            f"{self.first_row}: the tokenising process that worked on this row and those after it ended with exit code "
            f"{self.process.exitcode}; expected it to live. -9 means that it was killed, most likely for want of "
            "memory: use fewer --num-workers. Anything else is our bug; its traceback is above."
        )

    def close(self) -> None:
        self.connection.close()
        self.process.join(0.5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _deal(workers: list[_Worker], chunks: Iterator[Chunk]) -> Iterator[Result | None]:
    numbered = enumerate(chunks)
    following = next(numbered, None)
    finished: dict[int, Result] = {}
    next_index = 0
    while True:
        for worker in workers:
            limit = next_index + AHEAD_PER_WORKER * len(workers)
            if worker.index is None and following is not None and following[0] < limit:
                worker.give(*following)
                following = next(numbered, None)
        busy = {worker.connection: worker for worker in workers if worker.index is not None}
        if not busy:
            return
        ready = wait(list(busy), WAIT_S)
        for connection in ready:
            worker = busy[connection]  # type: ignore[index]
            index, finished_result = worker.take()
            finished[index] = finished_result
            if following is not None and following[0] < next_index + AHEAD_PER_WORKER * len(workers):
                worker.give(*following)
                following = next(numbered, None)
        if not ready:
            yield None
        while next_index in finished:
            yield finished.pop(next_index)
            next_index += 1


def _work(connection: Connection, ours: Sequence[Connection], config: DataConfig, encoder: Any, encode: Encode) -> None:
    """Body of a worker process; it ends when its owner closes the connection or is killed.

    What fork copied is let go: the owner's ends (`ours`), which would keep connections alive, and its signal handlers.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.SIG_IGN)
    for inherited in ours:
        inherited.close()
    if template := getattr(encoder, "template", None):
        template.is_expendable = True
    gc.freeze()  # a collection would touch, and so copy, every object of the tokenizer
    try:
        while True:
            chunk = connection.recv()
            with limited_memory(max(MEMORY_BYTES, BYTES_PER_CHARACTER * chunk.num_characters)):
                result = encode(encoder, config, chunk)
            connection.send(result)
    except UserError as error:
        connection.send(error)
    except MemoryError:
        connection.send(_too_large(chunk))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _too_large(chunk: Chunk) -> DataError:
    return DataError(
        f"{chunk.rows[0][0]}: tokenising this row, or one of the {len(chunk.rows) - 1} after it, needs more than "
        f"{MEMORY_BYTES / 2**30:g} GiB; expected far less. Split very long rows."
    )
