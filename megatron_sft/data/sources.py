"""Files, folders, globs and hub names -> records that know their file and line. Streams: memory does not grow with rows.

    open_source(path, config) -> Source; for where, record in source: ...

A line that cannot be read comes out as a RowError in the place of its record, so that the caller can set it aside and go on;
`schema.to_row` raises it. What ends a whole file (it is missing, damaged, no known format) is raised as DataError.
Endings: .jsonl .ndjson .json .parquet .arrow, the JSON ones also with .gz or .zst. Slices: `path@[a:b]` and `path@N%`.
"""

import glob
import gzip
import importlib.util
import io
import itertools
import json
import os
import re
import stat
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_sft.config import DataConfig
from megatron_sft.data.schema import RowError
from megatron_sft.errors import DataError

Record = dict[str, Any]
Item = tuple[str, Record | RowError]

MAX_LINE_BYTES = 16 * 2**20
ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
COMPRESSIONS = ("", ".gz", ".zst")
_SLICE = re.compile(r"^(?P<path>.+)@(?:\[(?P<start>\d*):(?P<stop>\d*)\]|(?P<percent>\d+(?:\.\d+)?)%)$")


class Source:
    """One named place of rows; every pass over it yields the same rows in the same order.

    Attributes:
        name: what reports call it (the file's stem, unless the user names it).
        path: as the user gave it, slice included.
        files: the local files that are read, in order; empty for hub names and custom classes.
        num_rows: rows, known only after one whole pass; None before.
    """

    def __init__(self, path: str, config: DataConfig, name: str | None = None):
        self.path, self.config = path, config
        found = _SLICE.match(path)
        self._base = found["path"] if found else path
        self._slice = (found["start"], found["stop"], found["percent"]) if found else None
        self.name = name or _stem(self._base)
        self.files = _local_files(self._base, config.data_split)
        self.num_rows: int | None = None
        if found and float(found["percent"] or 0) > 100:
            raise DataError(f"{path}: the slice is above 100 %; expected at most all rows. See --prompt-data-epochs for more.")

    def __iter__(self) -> Iterator[Item]:
        count = 0
        for count, item in enumerate(self._sliced(), start=1):  # noqa: B007
            yield item
        self.num_rows = count
        if not count:
            raise DataError(f"{self.path}: no row is there; expected at least one. Correct the path or its slice, or leave the "
                            "source out.")  # fmt: skip

    def __len__(self) -> int:
        """Rows; makes one pass when none was made before."""
        if self.num_rows is None:
            self.num_rows = sum(1 for _ in self._sliced())
        return self.num_rows

    def _sliced(self) -> Iterator[Item]:
        if self._slice is None:
            return self._all()
        start, stop, percent = self._slice
        if percent is not None:
            rows = sum(1 for _ in self._all())
            return itertools.islice(self._all(), int(rows * float(percent) / 100 + 0.5))
        return itertools.islice(self._all(), int(start or 0), int(stop) if stop else None)

    def _all(self) -> Iterator[Item]:
        if not self.files:
            yield from _hub_rows(self._base, self.config)
        for file in self.files:
            yield from read_file(file)


class CustomSource(Source):
    """Rows of a user's own class: CLASS(path) must be iterable and yield dicts (--custom-dataset FILE.py:CLASS)."""

    def __init__(self, path: str, config: DataConfig, name: str | None = None):
        self.path, self.config, self.files, self.num_rows, self._slice = path, config, [], None, None
        self.name = name or _stem(path)
        self._spec = str(config.custom_dataset)
        with _users_code(self._spec):
            self._class = _custom_class(self._spec)

    def _all(self) -> Iterator[Item]:
        with _users_code(self._spec):
            rows = iter(self._class(self.path))  # anew for each pass: a class may hold a generator
        for index in itertools.count(1):
            with _users_code(self._spec):
                record = next(rows, rows)
            if record is rows:
                return
            where = f"{self.path}:{index}"
            try:
                text = json.dumps(record)  # a copy, of what JSON has alone: it must reach another process and the quarantine
            except (TypeError, ValueError, RecursionError) as error:
                yield where, RowError(where, "not JSON", f"{self._spec} gave a value that JSON has not ({error}); expected "
                                      "text, numbers, lists and dicts. Correct the class.")  # fmt: skip
                continue
            if isinstance(record, dict):
                yield where, json.loads(text)
            else:
                yield where, RowError(where, "not an object", f"{self._spec} gave a {type(record).__name__}; expected a dict. "
                                      "Correct the class.")  # fmt: skip


def open_source(path: str, config: DataConfig, name: str | None = None) -> Source:
    """The source at a path or hub name.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    return CustomSource(path, config, name) if config.custom_dataset else Source(path, config, name)


def read_file(path: str) -> Iterator[Item]:
    """Rows of one local file, by its ending."""
    ending = _ending(path)
    if os.path.getsize(path) == 0:
        raise DataError(f"{path}: the file is empty; expected at least one row. Correct the path or fill the file.")
    if ending == ".parquet":
        return _parquet_rows(path)
    if ending == ".arrow":
        return _arrow_rows(path)
    return _json_rows(path) if ending == ".json" else _jsonl_rows(path)


def _stem(path: str) -> str:
    name = os.path.basename(path.rstrip("/"))
    return re.sub(r"(\.(jsonl|ndjson|json|parquet|arrow))?(\.(gz|zst))?$", "", name) or path


def _ending(path: str) -> str | None:
    return next((e for e in ENDINGS if path.lower().endswith(tuple(e + c for c in COMPRESSIONS))), None)


def _local_files(path: str, split: str) -> list[str]:
    """The data files below a path, each a file that can be read to an end; [] when it can only be a hub name."""
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "dataset_dict.json")):  # written by datasets.DatasetDict.save_to_disk
            return _local_files(os.path.join(path, split), split)
        files = sorted(file for file in _files_below(path) if _ending(file))
        if not files:
            raise DataError(f"{path}: the folder has no data file; expected {', '.join(ENDINGS)} (also .gz, .zst). "
                            "Correct the path.")  # fmt: skip
    elif os.path.lexists(path):
        files = [path]
    else:
        files = sorted(f for f in glob.glob(path, recursive=True) if _ending(f))
    if not files and (_ending(path) or path.startswith((".", "/", "~")) or path.count("/") > 1 or glob.has_magic(path)):
        raise DataError(f"{path}: no such file or folder; expected a data file, a folder, a glob or a hub name, and @[a:b] or "
                        "@N% for a part of it. Correct the path.")  # fmt: skip
    for file in files:
        try:
            mode = os.stat(file).st_mode
        except OSError as error:
            raise DataError(f"{file}: cannot be opened ({error.strerror}); expected a data file or folder. "
                            "Correct the path.") from None  # fmt: skip
        if _ending(file) is None:
            raise DataError(f"{file}: unknown ending; expected {', '.join(ENDINGS)} (also .gz, .zst). Rename the file.")
        if not stat.S_ISREG(mode):
            raise DataError(f"{file}: a pipe, device or folder; expected a file, which can be read more than once. "
                            "Write the rows into a file.")  # fmt: skip
    return files


def _files_below(folder: str) -> Iterator[str]:
    """Files of a folder and its subfolders, linked ones too, each folder once; not hidden ones, nor what datasets writes."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be opened ({error.strerror}); expected a folder that can be read. "
                        "Correct its rights, or the path.")  # fmt: skip

    seen = set()
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (identity := os.path.realpath(top)) in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(top, name) for name in names if not name.startswith((".", "dataset_info", "state.")))


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
        raise DataError(f"{path}: cannot be read to its end ({error}); expected a whole file. "
                        "Copy or compress it again.") from None  # fmt: skip


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
        return RowError(where, "bad UTF-8", f"byte {error.start} of the line is not UTF-8 ({error.reason}); expected "
                        "UTF-8 text. Convert the file with iconv.")  # fmt: skip
    except RecursionError:
        return RowError(where, "nested too deep", "the JSON is nested too deep; expected a flat record of messages. "
                        "Remove the row.")  # fmt: skip
    except ValueError as error:
        return RowError(where, "bad JSON", f"not valid JSON ({error}); expected one JSON object a line. "
                        "Correct or remove the line.")  # fmt: skip
    if isinstance(record, dict):
        return record
    return RowError(where, "not an object", f"the line holds a JSON {type(record).__name__}; expected an object such as "
                    '{"messages": [...]}. Correct or remove the line.')  # fmt: skip


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice in one object")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _jsonl_rows(path: str) -> Iterator[Item]:
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
                yield where, RowError(where, "line too long", f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB; "
                                      "expected one conversation a line. Split or remove it.")  # fmt: skip
            elif line.strip():
                yield where, parse_line(line, where)


def _json_rows(path: str) -> Iterator[Item]:
    """Objects of a JSON list, or objects one after the other (JSON lines under the name .json), one at a time."""
    with _opened(path) as stream:
        first = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first != b"[":
        yield from _jsonl_rows(path)
        return
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    with _opened(path) as stream:
        text = _TextBuffer(stream, path)
        text.skip("[")
        while (following := text.peek()) not in ("]", ""):
            where = f"{path}:{text.line}"
            record = text.value(decoder, where)
            if isinstance(record, dict):
                yield where, record
            elif isinstance(record, RowError):
                raise DataError(f"{record}")
            else:
                yield where, RowError(where, "not an object", f"the list holds a {type(record).__name__}; expected "
                                      'objects such as {"messages": [...]}. Correct or remove it.')  # fmt: skip
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
                detail = "the JSON is nested too deep; expected flat records. Remove the row."
                return RowError(where, "nested too deep", detail)
            except ValueError as error:
                # Read on only when the text may have ended in the middle of the value.
                if len(self._text) <= MAX_LINE_BYTES and self._more(block):
                    block *= 2
                    continue
                detail = f"not valid JSON ({error}); expected a list of objects. Correct the file."
                return RowError(where, "bad JSON", detail)
            if end == len(self._text) and self._more(block):
                continue
            self.line += self._text.count("\n", 0, end)
            self._text = self._text[end:]
            return value


def _without_nulls(value: Any) -> Any:
    """Arrow fills each struct with every key that any row has; the nulls among them were not in the data."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _batch_rows(batches: Iterator[Any], path: str) -> Iterator[Item]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", _without_nulls(record)


def _parquet_rows(path: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from _batch_rows(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=512), path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]}); expected Parquet. "
                        "Write or copy it again.") from None  # fmt: skip


def _arrow_rows(path: str) -> Iterator[Item]:
    import pyarrow

    try:
        with pyarrow.memory_map(path) as data:
            try:
                reader = pyarrow.ipc.open_file(data)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                batches = iter(pyarrow.ipc.open_stream(data))
            yield from _batch_rows((part for b in batches for part in _parts(b)), path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not an Arrow file that can be read ({str(error).splitlines()[0]}); expected Arrow IPC. "
                        "Write or copy it again.") from None  # fmt: skip


def _parts(batch: Any) -> Iterator[Any]:
    return (batch.slice(start, 512) for start in range(0, batch.num_rows, 512))


def _hub_rows(name: str, config: DataConfig) -> Iterator[Item]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: no such file; a hub name needs the datasets package. pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split=config.data_split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{name}: neither a local file nor a data set that the hub gave ({reason}); expected a path or a "
                        "hub name with that split. Correct the name, or --finetune-data-split.") from None  # fmt: skip
    for index, record in enumerate(rows, start=1):
        yield f"{name}:{index}", _without_nulls(record)


USER_FAULTS = (ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, NameError, OSError,
               RuntimeError, SyntaxError, TypeError, ValueError)  # fmt: skip


@contextmanager
def _users_code(spec: str) -> Iterator[None]:
    """What the user's own class raises becomes a DataError with file and line."""
    try:
        yield
    except USER_FAULTS as error:
        file = spec.rpartition(":")[0]
        places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else places[-1] if places else None
        raise DataError(f"{file}:{line or 1}: {type(error).__name__}: {error}. Expected a class whose CLASS(path) yields "
                        "dicts. Correct the class.") from error  # fmt: skip


def _custom_class(spec: str) -> type:
    """The class named by FILE.py:CLASS."""
    file, _, class_name = spec.rpartition(":")
    if not file or not Path(file).is_file():
        raise DataError(f"--custom-dataset {spec}: no such file; expected FILE.py:CLASS. Correct the path.")
    module_spec = importlib.util.spec_from_file_location("megatron_sft_custom_dataset", file)
    assert module_spec is not None and module_spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise DataError(f"--custom-dataset {spec}: {file} has no class {class_name}; expected a class whose CLASS(path) "
                        "yields dicts. Correct the name.")  # fmt: skip
    return found
