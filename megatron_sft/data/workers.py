"""Tokenising processes. Not here: what is done to the rows (tokens.py: encode_rows)."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.fast_bpe import text_tokenizer
from megatron_sft.data.fork import forked
from megatron_sft.data.trial import limited_memory
from megatron_sft.errors import DataError, UserError

MEMORY_BYTES = 2**30
BYTES_PER_CHARACTER = 192
"""What a worker may allocate for a portion: MEMORY_BYTES, more for rows of many megabytes. No template fills the machine."""
AHEAD_PER_WORKER = 4
"""Finished results that may wait for an earlier one, a worker."""
WAIT_S = 5.0
ENDED = "ended its process"
KILLED = (
    f"tokenising the row alone got its process killed, twice (exit code {-signal.SIGKILL}); most likely memory was short, and "
    "fewer --num-workers need less"
)
LONG_TEXT = 2**20
"""Characters; longer ones would take the checks before a build minutes."""


@dataclass(frozen=True)
class Portion:
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
    """The documents of one portion, one after another."""

    source_id: int
    num_rows: int
    tokens: np.ndarray
    """int32 [n]."""
    loss_mask: np.ndarray
    """uint8 or float32 [n]."""
    lengths: np.ndarray
    """int32 [documents]."""
    rows: np.ndarray
    """int64 [documents]: each one's row in the portion, from 0."""
    where: list[str]
    counts: dict[str, int]
    """Rows by fate (kept, truncated, split, dropped:REASON), and lost_tokens."""
    problems: list[Problem]


Encode = Callable[[Any, DataConfig, Portion], Result]
MakeEncoder = Callable[[DataConfig, Sequence[Portion]], Any]


def in_order(portions: Iterator[Portion], config: DataConfig, encoder: Any, encode: Encode) -> Iterator[Result | None]:
    """Results of `encode(encoder, config, portion)` in the order of the portions; None when a few seconds brought none.

    Args:
        portions: read only as fast as they are worked on.
        config: num_workers processes; 0: one a core.
        encoder: forked into each process: loading a tokenizer takes seconds, and 200 MB that are shared so.
        encode: what is done to a portion.

    Raises:
        DataError: what a worker raised, or that more than max_bad_rows rows ended or killed one.
    """
    num_workers = config.num_workers or len(os.sched_getaffinity(0))
    first = list(itertools.islice(portions, num_workers))
    workers: list[_Worker] = []
    try:
        for _ in range(min(num_workers, len(first))):
            workers.append(_Worker(config, encoder, encode, workers))
        yield from _deal(workers, itertools.chain(first, portions))
    finally:
        for worker in workers:
            worker.process.kill()  # before any of them is waited for
        for worker in workers:
            worker.close()


def make_encoder(config: DataConfig, sample: Sequence[Portion]) -> Any:
    """The ChatEncoder of `config`; the fast tokeniser is checked on the sample's own texts before it is used."""
    from megatron_sft.data.chat import ChatEncoder, load_tokenizer

    with _without_collection():
        tokenizer = load_tokenizer(config)
        encoder = ChatEncoder(tokenizer, config)
        if getattr(tokenizer, "is_fast", False) and hasattr(encoder, "tokenise"):
            texts = (text for portion in sample for _, record in portion.rows[:16] for text in _strings(record))
            encoder.tokenise = text_tokenizer(tokenizer, [text for text in texts if len(text) < LONG_TEXT])
            if encoder.literal is not None:
                encoder.literal.tokenise = text_tokenizer(encoder.literal.tokenizer)
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
    """One process, which has at most one portion at a time: sending never waits for a process that waits for us.

    Not concurrent.futures' pool: that does not say what its dead process had or how it died, and outlives a killed owner.
    """

    def __init__(self, config: DataConfig, encoder: Any, encode: Encode, workers: Sequence["_Worker"]):
        self._config, self._body, self._workers = config, (config, encoder, encode), workers
        self.index: int | None = None
        self._start()

    def _start(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        ours = [self.connection, *(worker.connection for worker in self._workers if worker is not self)]
        self.process = forked(_work, theirs, ours, *self._body)
        theirs.close()

    def give(self, index: int, portion: Portion) -> None:
        self.index, self._portion = index, portion
        with contextlib.suppress(OSError):  # a dead process, which `take` meets
            self.connection.send(portion)

    def take(self) -> tuple[int, Result]:
        """The portion's number and result; a row that ends the process is set aside, as any bad row is."""
        assert self.index is not None, "only a worker that has a portion gives a result"
        index, portion, (result, death) = self.index, self._portion, self._answer()
        if death == KILLED and len(portion.rows) == 1:  # perhaps for the memory that others took
            self.give(index, portion)
            result, death = self._answer()
        if result is None:
            result = self._set_aside(portion, death) if len(portion.rows) == 1 else self._row_by_row(portion)
        self.index = None
        return index, result

    def _row_by_row(self, portion: Portion) -> Result:
        results = []
        for row in portion.rows:
            self.give(0, Portion(portion.source_id, [row], portion.num_characters))
            results.append(self.take()[1])
            if sum(result.problems != [] for result in results) > self._config.max_bad_rows:
                raise DataError("\n".join(problem.message for result in results for problem in result.problems))
        return _joined(results)

    def _set_aside(self, portion: Portion, death: str) -> Result:
        ((where, record),) = portion.rows
        message = f"{where}: {death}; expected a row like others. Correct or remove it, or pass another --chat-template."
        return Result(
            source_id=portion.source_id,
            num_rows=1,
            tokens=np.zeros(0, np.int32),
            loss_mask=np.zeros(0, np.uint8),
            lengths=np.zeros(0, np.int32),
            rows=np.zeros(0, np.int64),
            where=[],
            counts={f"dropped:{ENDED}": 1},
            problems=[Problem(where, ENDED, message, record)],
        )

    def _answer(self) -> tuple[Result | None, str]:
        """The process's result, or None and what ended it; then a new process stands in its place."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            answer = None
        if isinstance(answer, Result):
            return answer, ""
        if isinstance(answer, UserError):
            raise answer
        self.process.join(WAIT_S)
        code = self.process.exitcode
        self.close()
        self._start()
        if isinstance(answer, MemoryError):
            return None, f"tokenising the row needs more than {MEMORY_BYTES / 2**30:g} GiB"
        if code == -signal.SIGPROF:
            return None, "the row takes too long to render or tokenise"
        if code == -signal.SIGKILL:
            return None, KILLED
        return None, f"tokenising the row ended its process (exit code {code})"

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _joined(results: Sequence[Result]) -> Result:
    """The result of rows that were given singly, as if they had come together."""
    starts = itertools.accumulate((result.num_rows for result in results), initial=0)
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    return Result(
        source_id=results[0].source_id,
        num_rows=sum(result.num_rows for result in results),
        tokens=np.concatenate([result.tokens for result in results]),
        loss_mask=np.concatenate([result.loss_mask for result in results]),
        lengths=np.concatenate([result.lengths for result in results]),
        rows=np.concatenate([result.rows + start for result, start in zip(results, starts, strict=False)]),
        where=[where for result in results for where in result.where],
        counts=dict(counts),
        problems=[problem for result in results for problem in result.problems],
    )


def _deal(workers: list[_Worker], portions: Iterator[Portion]) -> Iterator[Result | None]:
    numbered = enumerate(portions)
    following = next(numbered, None)
    finished: dict[int, Result] = {}
    next_index = 0
    while True:
        for worker in workers:
            limit = next_index + AHEAD_PER_WORKER * len(workers)
            if worker.index is None and following is not None and following[0] < limit:
                worker.give(*following)
                following = next(numbered, None)
        while next_index in finished:  # while all processes have work
            yield finished.pop(next_index)
            next_index += 1
        busy = {worker.connection: worker for worker in workers if worker.index is not None}
        if not busy and following is None:
            return
        ready = wait(list(busy), WAIT_S)
        finished.update(busy[connection].take() for connection in ready)  # type: ignore[index]
        if not ready:
            yield None


def _work(connection: Connection, ours: Sequence[Connection], config: DataConfig, encoder: Any, encode: Encode) -> None:
    """Body of a worker process; it ends when its owner closes the connection or is killed.

    What fork copied is let go: the owner's ends (`ours`), which would keep connections alive.
    """
    for inherited in ours:
        inherited.close()
    encoder.is_expendable = True
    gc.freeze()  # a collection would touch, and so copy, every object of the tokenizer
    try:
        while True:
            portion = connection.recv()
            with limited_memory(max(MEMORY_BYTES, BYTES_PER_CHARACTER * portion.num_characters)):
                result = encode(encoder, config, portion)
            connection.send(result)
    except (UserError, MemoryError) as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
