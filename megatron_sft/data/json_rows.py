"""JSON lines and JSON lists, packed or not -> records that know their line. Streams: memory does not grow with rows.

A line that cannot be read comes out as a RowError in the place of its record. Not here: which files there are (sources.py).
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from megatron_sft.data.schema import RowError
from megatron_sft.errors import DataError

Record = dict[str, Any]
Item = tuple[str, Record | RowError]
"""(file:line, one row)."""

MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 64
TOO_DEEP = f"the JSON is nested too deep; expected at most {MAX_DEPTH} levels. Remove the row."


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; damage that ends the file becomes a DataError."""
    try:
        with open(path, "rb") as raw:
            if path.lower().endswith(".gz"):
                with gzip.open(raw) as stream:
                    yield stream  # type: ignore[misc]
            elif path.lower().endswith(".zst"):
                with _zstandard_reader(raw) as stream:
                    yield stream
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read to its end ({error}); expected a whole file. Copy or compress it again."
        ) from None


@contextmanager
def _zstandard_reader(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{raw.name}: .zst needs the zstandard package. pip install zstandard") from None
    try:
        yield io.BufferedReader(_ZstandardFrames(raw, zstandard.ZstdDecompressor().decompressobj))
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None


class _ZstandardFrames(io.RawIOBase):
    """The bytes of all frames. Unlike zstandard's own reader, which ends silently, it refuses a last frame that is cut off."""

    def __init__(self, raw: IO[bytes], new_frame: Callable[[], Any]):
        self._raw, self._new_frame = raw, new_frame
        self._frame: Any = None
        self._rest = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._raw.read(2**14)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready, self._rest = self._frame.decompress(data), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def parse_line(line: bytes, where: str) -> Record | RowError:
    """One JSON object; a RowError says why it is none."""
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return RowError(
            where,
            "bad UTF-8",
            f"byte {error.start} of the line is not UTF-8 ({error.reason}); expected UTF-8 text. Convert the file with iconv.",
        )
    except RecursionError:
        return RowError(where, "nested too deep", TOO_DEEP)
    except ValueError as error:
        return RowError(
            where, "bad JSON", f"not valid JSON ({error}); expected one JSON object a line. Correct or remove the line."
        )
    if isinstance(record, dict):
        return _flat(record, where)
    return RowError(
        where,
        "not an object",
        f"the line holds a JSON {type(record).__name__}; expected an object such as "
        '{"messages": [...]}. Correct or remove the line.',
    )


def _flat(record: Record, where: str) -> Record | RowError:
    """The record, or why not: deeper ones exceed the stack of pickle, Jinja or transformers."""
    level: list[Any] = [record]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return record
    return RowError(where, "nested too deep", TOO_DEEP)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice in one object")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def jsonl_rows(path: str) -> Iterator[Item]:
    with _opened(path) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(2**20)
                yield (
                    where,
                    RowError(
                        where,
                        "line too long",
                        f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB; "
                        "expected one conversation a line. Split or remove it.",
                    ),
                )
            elif line.strip():
                yield where, parse_line(line, where)


def json_rows(path: str) -> Iterator[Item]:
    """Objects of a JSON list, or objects one after the other (JSON lines under the name .json), one at a time."""
    with _opened(path) as stream:
        begin = stream.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if begin[:1] == b"{" and begin.partition(b"\n")[0].strip() == b"{":
        raise DataError(
            f"{path}:1: an object over several lines; expected a list of objects, or one object a line. Write the "
            "file anew as one of these."
        )
    if begin[:1] != b"[":
        yield from jsonl_rows(path)
        return
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    with _opened(path) as stream:
        text = _TextBuffer(stream, path)
        text.skip("[")
        while (following := text.peek()) not in ("]", ""):
            where = f"{path}:{text.line}"
            record = text.value(decoder, where)
            if isinstance(record, dict):
                yield where, _flat(record, where)
            elif isinstance(record, RowError):
                raise DataError(f"{record}")
            else:
                yield (
                    where,
                    RowError(
                        where,
                        "not an object",
                        f"the list holds a {type(record).__name__}; expected "
                        'objects such as {"messages": [...]}. Correct or remove it.',
                    ),
                )
            following = text.peek()
            if following == ",":
                text.skip(",")
            elif following != "]":
                break
        if following != "]":
            raise DataError(
                f"{path}:{text.line}: the JSON list is not closed; expected , or ] and found "
                f"{following or 'the end of the file'!r}. The file is cut off or damaged: write it again."
            )
        text.skip("]")
        if following := text.peek():
            raise DataError(
                f"{path}:{text.line}: {following!r} follows the JSON list; expected the end of the file. Put all "
                "rows into one list."
            )


class _TextBuffer:
    """A window on a JSON text that grows only to the longest value. `line`: 1-based line of the next character."""

    def __init__(self, stream: IO[bytes], path: str):
        self._stream, self._path = stream, path
        self._text, self._rest, self.line, self._is_first = "", b"", 1, True

    def _more(self, num_bytes: int) -> bool:
        data = self._stream.read(num_bytes)
        if self._is_first:
            data, self._is_first = data.removeprefix(b"\xef\xbb\xbf"), False
        block = self._rest + data
        try:
            self._text, self._rest = self._text + block.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            # A character cut by the end of the block waits for the next one.
            if not data or len(block) - error.start > 3:
                raise DataError(
                    f"{self._path}:{self.line}: bytes that are not UTF-8 ({error.reason}) in or after the value that "
                    "starts here; expected UTF-8 text. Convert the file with iconv."
                ) from None
            self._text, self._rest = self._text + block[: error.start].decode("utf-8"), block[error.start :]
        return bool(data)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            bare = self._text.lstrip(" \t\r\n")
            self.line += self._text.count("\n", 0, len(self._text) - len(bare))
            self._text = bare
            if bare or not self._more(2**20):
                return bare[:1]

    def skip(self, character: str) -> None:
        if self.peek() == character:
            self._text = self._text[1:]

    def value(self, decoder: json.JSONDecoder, where: str) -> Any:
        """The next JSON value; a RowError when there is none."""
        block = 2**20
        while True:
            try:
                value, end = decoder.raw_decode(self._text)
            except RecursionError:
                return RowError(where, "nested too deep", TOO_DEEP)
            except ValueError as error:
                # Read on only when the text may have ended in the middle of the value.
                if len(self._text) > MAX_LINE_BYTES:
                    detail = f"longer than {MAX_LINE_BYTES // 2**20} MiB, or no valid JSON; expected one conversation. Split it."
                    return RowError(where, "line too long", detail)
                if self._more(block):
                    block *= 2
                    continue
                detail = f"not valid JSON ({error}); expected a list of objects. Correct the file."
                return RowError(where, "bad JSON", detail)
            if end == len(self._text) and self._more(block):
                continue
            self.line += self._text.count("\n", 0, end)
            self._text = self._text[end:]
            return value
