"""JSON lines and JSON lists, packed or not -> records that know their line. Streams: memory does not grow with rows.

A line that cannot be read comes out as a RowError in the place of its record. Not here: which files there are (sources.py).
"""

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_sft.data.limits import ANY_JSON, MAX_ROW_BYTES, STRICT_JSON, TOO_DEEP, TOO_LONG, NotStrictError, is_deep
from megatron_sft.data.schema import RowError
from megatron_sft.errors import DataError

Record = dict[str, Any]
Item = tuple[str, Record | RowError]
"""(file:line, one row)."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 2**16
WINDOW_BYTES = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


@contextmanager
def _opened(path: str) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed; damage that ends the file becomes a DataError."""
    codec = next((codec for ending, codec in COMPRESSIONS.items() if path.lower().endswith(ending)), None)
    try:
        with io.BufferedReader(_decompressed(path, codec) if codec else open(path, "rb", 0), BLOCK_BYTES) as stream:
            yield stream
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read to its end ({error}); expected a whole file. Copy or compress it again."
        ) from None


def _decompressed(path: str, codec: str) -> Any:
    import pyarrow

    return pyarrow.input_stream(path, compression=codec, buffer_size=BLOCK_BYTES)


def parse_line(line: bytes, where: str) -> Record | RowError:
    """One JSON object; a RowError says why it is none."""
    if len(line) > MAX_ROW_BYTES:
        return RowError(where, "row too long", TOO_LONG)
    try:
        record = STRICT_JSON.decode(line.decode("utf-8"))
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
    return _object(record, where, "line")


def _object(record: Any, where: str, what: str) -> Record | RowError:
    if isinstance(record, RowError):
        return record
    if not isinstance(record, dict):
        return RowError(
            where,
            "not an object",
            f"the {what} holds a JSON {type(record).__name__}; expected an object such as "
            f'{{"messages": [...]}}. Correct or remove the {what}.',
        )
    return RowError(where, "nested too deep", TOO_DEEP) if is_deep(record) else record


def jsonl_rows(path: str) -> Iterator[Item]:
    with _opened(path) as stream:
        number = 1
        while line := stream.readline(MAX_ROW_BYTES + 1):
            bare = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            where = f"{path}:{number}"
            if bare.strip():
                yield where, parse_line(bare, where)
            else:
                number += _skip_blank_lines(stream)
            number += line.endswith(b"\n")
            while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):  # what is left of a line that was too long
                line = stream.readline(MAX_ROW_BYTES + 1)
                number += line.endswith(b"\n")


def _skip_blank_lines(stream: io.BufferedReader) -> int:
    """Reads the white space that follows; returns how many lines ended in it. 300 MB of them, read singly, take a minute."""
    count = 0
    while blank := len(ahead := stream.peek()) - len(ahead.lstrip()):
        count += stream.read(blank).count(b"\n")
    return count


def json_rows(path: str) -> Iterator[Item]:
    """Objects of a JSON list, or objects one after the other (JSON lines under the name .json), one at a time."""
    with _opened(path) as stream:
        begin = stream.read(BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if begin[:1] == b"{" and begin.partition(b"\n")[0].strip() == b"{":
        raise DataError(
            f"{path}:1: an object over several lines; expected a list of objects, or one object a line. Write the "
            "file anew as one of these."
        )
    if begin[:1] != b"[":
        yield from jsonl_rows(path)
        return
    with _opened(path) as stream:
        text = _Window(stream, path)
        following = text.after()
        while (following := text.after(following)) not in ("]", ""):
            where = f"{path}:{text.line}"
            yield where, _object(text.value(where), where, "list")
            following = text.after()
            if following != ",":
                break
        if following != "]":
            raise DataError(
                f"{path}:{text.line}: the JSON list is not closed; expected , or ] and found "
                f"{following or 'the end of the file'!r}. The file is cut off or damaged: write it again."
            )
        if following := text.after("]"):
            raise DataError(
                f"{path}:{text.line}: {following!r} follows the JSON list; expected the end of the file. Put all "
                "rows into one list."
            )


class _Window:
    """What has been read of a JSON text around its next value: no more than the longest one and as much again.

    `line` is that of the next character, from 1. A list of gigabytes is common, so the text is never whole in memory.
    """

    def __init__(self, stream: io.BufferedReader, path: str):
        self._stream, self._path = stream, path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self.line = "", 0, 1

    def _more(self) -> bool:
        data = self._stream.read(max(WINDOW_BYTES, len(self._text) - self._at))
        try:
            new = self._decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path}:{self.line}: bytes that are not UTF-8 ({error.reason}) in or after the value that "
                "starts here; expected UTF-8 text. Convert the file with iconv."
            ) from None
        self._text, self._at = self._text[self._at :] + new, 0
        return bool(data)

    def _go_to(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def after(self, passed: str = "") -> str:
        """The next character that is no white space, beyond `passed`, which stood there; empty at the end."""
        self._at += len(passed)
        while True:
            self._go_to(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]  # also matches nothing
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def value(self, where: str) -> Any:
        """The next JSON value; a RowError in its place when it may not be used.

        Raises:
            DataError: none is there, or it is so long or so deep that nobody knows where the next one begins.
        """
        while True:
            try:
                value, end = _raw_decode(self._text, self._at, where)
            except RecursionError:
                raise DataError(f"{where}: {TOO_DEEP}") from None
            except ValueError as error:
                # Read on only when the text may have ended in the middle of the value.
                if len(self._text) - self._at > MAX_ROW_BYTES:
                    raise DataError(f"{where}: no valid JSON, or {TOO_LONG}") from None
                if self._more():
                    continue
                raise DataError(f"{where}: not valid JSON ({error}); expected a list of objects. Correct the file.") from None
            if end == len(self._text) and self._more():
                continue
            is_long = end - self._at > MAX_ROW_BYTES
            self._go_to(end)
            return RowError(where, "row too long", TOO_LONG) if is_long else value


def _raw_decode(text: str, start: int, where: str) -> tuple[Any, int]:
    """The JSON value at `start` and where it ends; a RowError in its place when it is not strict JSON."""
    try:
        return STRICT_JSON.raw_decode(text, start)
    except NotStrictError as error:
        _, end = ANY_JSON.raw_decode(text, start)
        return RowError(where, "bad JSON", f"not valid JSON ({error}); expected a list of objects. Correct or remove it."), end
