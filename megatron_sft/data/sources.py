"""Files, folders, globs and hub names -> records that know their file and line. Streams: memory does not grow with rows.

    open_source(path, config) -> Source; for where, record in source: ...

A line that cannot be read comes out as a RowError in the place of its record, so that the caller can set it aside and go on;
`schema.to_row` raises it. What ends a whole file (it is missing, damaged, no known format) is raised as DataError.
Endings: .jsonl .ndjson .json .parquet .arrow, the JSON ones also with .gz or .zst. Slices: `path@[a:b]` and `path@N%`.
"""

import glob
import importlib.util
import itertools
import json
import os
import re
import stat
import traceback
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sft.config.run import DataConfig
from megatron_sft.data.json_rows import COMPRESSIONS, Item, json_rows, jsonl_rows, parse_line
from megatron_sft.data.limits import MAX_ROW_BYTES, TOO_DEEP, TOO_LONG, NotStrictError, is_deep, num_characters, unique_keys
from megatron_sft.data.schema import RowError
from megatron_sft.data.splits import files_of_split
from megatron_sft.data.trial import limited_memory
from megatron_sft.errors import DataError
from megatron_sft.log import logger

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
BATCH_ROWS = 512
BATCH_BYTES = 2**26
BATCH_MEMORY_BYTES = 2**31
"""What a batch of Parquet may become in memory: a dictionary of a few megabytes can stand for any number of them."""
HUB_S = 10.0
_HUB = re.compile(
    r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?)(:(?P<config>[A-Za-z0-9_][A-Za-z0-9_.+-]*))?"
)
_SLICE = re.compile(r"^(?P<path>.+)@(?:\[(?P<start>\d{0,15}):(?P<stop>\d{0,15})\]|(?P<percent>\d+(?:\.\d+)?)%)$", re.ASCII)


class Source:
    """One named place of rows; every pass over it yields the same rows in the same order.

    Attributes:
        name: what reports call it (the file's stem, unless the user names it).
        path: as the user gave it, slice included.
        files: the local files that are read, in order; empty for hub names and custom classes.
        splits: of a folder or hub name that has splits; the first that is there is read.
        num_rows: rows, known only after one whole pass; None before.
    """

    def __init__(self, path: str, config: DataConfig, name: str | None = None, splits: Sequence[str] = ()):
        self.path, self.config, self.splits = path, config, tuple(splits) or (config.data_split,)
        match = _SLICE.match(path)
        self._base = match["path"] if match else path
        self._slice = (match["start"], match["stop"], match["percent"]) if match else None
        self.name = name or _stem(self._base)
        self.files = _local_files(self._base, self.splits)
        self.num_rows: int | None = None
        if self.files and config.data_config:
            logger.info("--finetune-data-config has no effect on %s, which is on this machine.", path)
        if match and float(match["percent"] or 0) > 100:
            raise DataError(f"{path}: the slice is above 100 %; expected at most all rows. See --prompt-data-epochs for more.")

    def __iter__(self) -> Iterator[Item]:
        count = 0
        for count, item in enumerate(self._sliced(), start=1):  # noqa: B007
            yield item
        self.num_rows = count
        if not count:
            raise DataError(
                f"{self.path}: no row is there; expected at least one. Correct the path or its slice, or leave the source out."
            )

    def commit(self) -> str | None:
        """What a hub name stands for now; None for files, and where nobody says."""
        if self.files:
            return None
        spelled = _HUB.fullmatch(self._base)
        return hub_commit(spelled["name"] if spelled else self._base, "dataset")

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
            yield from _hub_rows(self._base, self.splits, self.config.data_config)
        for file in self.files:
            yield from read_file(file)


class CustomSource(Source):
    """Rows of a user's own class: CLASS(path) must be iterable and yield dicts (--custom-dataset FILE.py:CLASS)."""

    def __init__(self, path: str, config: DataConfig, name: str | None = None):
        self.path, self.config, self.files, self.num_rows, self._slice, self.splits = path, config, [], None, None, ()
        self.name = name or _stem(path)
        self._spec = str(config.custom_dataset)
        self._class = _custom_class(self._spec)

    def commit(self) -> str | None:
        return None

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
                yield (
                    where,
                    RowError(
                        where,
                        "not JSON",
                        f"{self._spec} gave a value that JSON has not ({error}); expected "
                        "text, numbers, lists and dicts. Correct the class.",
                    ),
                )
                continue
            if isinstance(record, dict):
                yield where, parse_line(text.encode(), where)
            else:
                yield (
                    where,
                    RowError(
                        where,
                        "not an object",
                        f"{self._spec} gave a {type(record).__name__}; expected a dict. Correct the class.",
                    ),
                )


def open_source(path: str, config: DataConfig, name: str | None = None, splits: Sequence[str] = ()) -> Source:
    """The source at a path or hub name.

    Args:
        path: file, folder, glob or hub name, perhaps with a slice.
        config: how it is read.
        name: what reports call it; None: the file's stem.
        splits: of a folder or hub name that has several, the first that is there; empty: config.data_split.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    return CustomSource(path, config, name) if config.custom_dataset else Source(path, config, name, splits)


def read_file(path: str) -> Iterator[Item]:
    """Rows of one local file, by its ending."""
    ending = _ending(path)
    if os.path.getsize(path) == 0:
        raise DataError(f"{path}: the file is empty; expected at least one row. Correct the path or fill the file.")
    if ending == ".parquet":
        return _parquet_rows(path)
    if ending == ".arrow":
        return _arrow_rows(path)
    return json_rows(path) if ending == ".json" else jsonl_rows(path)


def _stem(path: str) -> str:
    name = os.path.basename(path.rstrip("/"))
    return re.sub(r"(\.(jsonl|ndjson|json|parquet|arrow))?(\.(gz|zst))?$", "", name) or path


def _ending(path: str) -> str | None:
    return next((e for e in ENDINGS if path.lower().endswith(tuple(e + c for c in ("", *COMPRESSIONS)))), None)


def _local_files(path: str, splits: Sequence[str]) -> list[str]:
    """The data files below a path, each a file that can be read to an end; [] when it can only be a hub name."""
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "dataset_dict.json")):  # written by datasets.DatasetDict.save_to_disk
            split = next((split for split in splits if os.path.isdir(os.path.join(path, split))), splits[0])
            return _local_files(os.path.join(path, split), splits)
        files = sorted(file for file in _files_below(path) if _ending(file))
        if not files:
            raise DataError(
                f"{path}: the folder has no data file; expected {', '.join(ENDINGS)} (also .gz, .zst). Correct the path."
            )
        files = files_of_split(path, files, splits)
    elif os.path.lexists(path):
        files = [path]
    else:
        files = sorted(f for f in glob.glob(path, recursive=True) if _ending(f))
    if not files and (_ending(path) or path.startswith((".", "/", "~")) or path.count("/") > 1 or glob.has_magic(path)):
        raise DataError(
            f"{path}: no such file or folder; expected a data file, a folder, a glob or a hub name, and @[a:b] or "
            "@N% for a part of it. Correct the path."
        )
    for file in files:
        try:
            mode = os.stat(file).st_mode
        except OSError as error:
            raise DataError(
                f"{file}: cannot be opened ({error.strerror}); expected a data file or folder. Correct the path."
            ) from None
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in file):
            raise DataError(
                f"{file!a}: control characters in the name, or it is not UTF-8; expected a name that can be printed. "
                "Rename the file."
            )
        if _ending(file) is None:
            raise DataError(f"{file}: unknown ending; expected {', '.join(ENDINGS)} (also .gz, .zst). Rename the file.")
        if not stat.S_ISREG(mode):
            raise DataError(
                f"{file}: a pipe, device or folder; expected a file, which can be read more than once. "
                "Write the rows into a file."
            )
    return files


def _files_below(folder: str) -> Iterator[str]:
    """Files of a folder and its subfolders, linked ones too, each folder once; not hidden ones, nor what datasets writes."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be opened ({error.strerror}); expected a folder that can be read. "
            "Correct its rights, or the path."
        )

    seen = set()
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (identity := os.path.realpath(top)) in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(top, name) for name in names if not name.startswith((".", "dataset_info", "state.")))


def _plain(value: Any) -> Any:
    """Arrow fills each struct with every key that any row has; the nulls among them were not in the data. Maps come as pairs."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        value = unique_keys(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _item(record: Any, where: str) -> Item:
    """A row that did not come as JSON text, held to the same limits."""
    try:
        row = _plain(record)
    except NotStrictError as error:
        return where, RowError(where, "bad map", f"a map of which {error}; expected each key once. Correct the row.")
    if num_characters(row) > MAX_ROW_BYTES:
        return where, RowError(where, "row too long", TOO_LONG)
    return where, RowError(where, "nested too deep", TOO_DEEP) if is_deep(row) else row


def _batch_rows(batches: Iterable[Any], schema: Any, path: str) -> Iterator[Item]:
    _refuse_repeated_columns(schema, path)
    records = (record for batch in batches for part in _parts(batch) for record in part.to_pylist())
    for number, record in enumerate(records, start=1):
        yield _item(record, f"{path}:{number}")


def _refuse_repeated_columns(schema: Any, path: str) -> None:
    left = [list(schema)]
    while left:
        fields = left.pop()
        names = [field.name for field in fields]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}: column {name!r} occurs twice; expected it once. Rename or remove one of them.")
        left += [[field.type.field(i) for i in range(field.type.num_fields)] for field in fields]


def _parts(batch: Any) -> Iterator[Any]:
    """The rows of a batch, so few at a time that their Python objects fit into memory."""
    if batch.num_rows <= 1 or (batch.num_rows <= BATCH_ROWS and batch.nbytes <= MAX_ROW_BYTES):
        yield batch
        return
    half = batch.num_rows // 2
    yield from _parts(batch.slice(0, half))
    yield from _parts(batch.slice(half))


def _parquet_rows(path: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))
        yield from _batch_rows(_parquet_batches(path, rows), file.schema_arrow, path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]}); expected Parquet. "
            "Write or copy it again."
        ) from None


def _parquet_batches(path: str, rows: int) -> Iterator[Any]:
    """Batches of so many rows; from where one does not fit into BATCH_MEMORY_BYTES, row by row."""
    import pyarrow
    import pyarrow.parquet

    done = 0
    for size in (rows, 1):
        batches, skipped = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=size), 0
        while True:
            try:
                with limited_memory(BATCH_MEMORY_BYTES):
                    batch = next(batches, None)
            except (MemoryError, pyarrow.ArrowMemoryError):
                break
            if batch is None:
                return
            if skipped < done:  # the same rows again, now one by one
                skipped += batch.num_rows
                continue
            yield batch
            skipped = done = done + batch.num_rows
            del batch
    raise DataError(
        f"{path}:{done + 1}: the row needs more than {BATCH_MEMORY_BYTES // 2**30} GiB of memory; expected one conversation. "
        "Remove it, or write the file again without dictionaries."
    )


def _arrow_rows(path: str) -> Iterator[Item]:
    import pyarrow

    try:
        with pyarrow.memory_map(path) as data:
            try:
                reader = pyarrow.ipc.open_file(data)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                batches = reader = pyarrow.ipc.open_stream(data)
            yield from _batch_rows((_checked(batch) for batch in batches), reader.schema, path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not an Arrow file that can be read ({str(error).splitlines()[0]}); expected Arrow IPC. "
            "Write or copy it again."
        ) from None


def _checked(batch: Any) -> Any:
    batch.validate(full=True)  # pyarrow reads damaged offsets without a check, and beyond the memory
    return batch


def hub_commit(name: str, kind: str) -> str | None:
    """The commit of a hub name: what the hub says, else what its cache on this machine has; None where neither does.

    Args:
        name: of the hub.
        kind: "dataset" or "model".
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    faults: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)  # the last: of its HTTP library
    try:
        return HfApi().repo_info(name, repo_type=kind, timeout=HUB_S).sha
    except faults:
        reference = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}", "refs", "main")
        return reference.read_text(encoding="ascii", errors="replace").strip() if reference.is_file() else None


def _hub_rows(place: str, splits: Sequence[str], config: str | None) -> Iterator[Item]:
    """Rows of a data set of the hub: NAME, or NAME:CONFIG, which counts before `config`."""
    try:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise DataError(f"{place}: no such file; a hub name needs the datasets package. pip install datasets") from None
    spelled = _HUB.fullmatch(place)
    name, config = (spelled["name"], spelled["config"] or config) if spelled else (place, config)
    reason = ""
    for split in splits:
        try:
            rows = datasets.load_dataset(name, config, split=split)
        except (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = reason or " ".join(str(error).split())[:600] or type(error).__name__
            if isinstance(error, ValueError):  # such as an unknown split
                continue
            break
        for index, record in enumerate(rows, start=1):
            yield _item(record, f"{place}:{index}")
        return
    raise DataError(
        f"{place}: neither a local file nor a data set that the hub gave ({reason}); expected a path or a hub name with split "
        f"{' or '.join(splits)}, as NAME:CONFIG where it has several configurations. Correct the name, --finetune-data-config or "
        "--finetune-data-split. Without a network download it elsewhere (hf download NAME --repo-type dataset --local-dir "
        "FOLDER), copy the folder here and name that."
    )


USER_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
)


@contextmanager
def _users_code(spec: str) -> Iterator[None]:
    """What the user's own class raises becomes a DataError with file and line."""
    try:
        yield
    except USER_FAULTS as error:
        file = spec.rpartition(":")[0]
        places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else places[-1] if places else None
        raise DataError(
            f"{file}:{line or 1}: {type(error).__name__}: {error}. Expected a class whose CLASS(path) yields "
            "dicts. Correct the class."
        ) from error


def _custom_class(spec: str) -> type:
    """The class named by FILE.py:CLASS."""
    file, _, class_name = spec.rpartition(":")
    if not file or not Path(file).is_file():
        raise DataError(f"--custom-dataset {spec}: no such file; expected FILE.py:CLASS. Correct the path.")
    module_spec = importlib.util.spec_from_file_location("megatron_sft_custom_dataset", file)
    assert module_spec is not None and module_spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(module_spec)
    with _users_code(spec):
        module_spec.loader.exec_module(module)
    named = getattr(module, class_name, None)
    if not isinstance(named, type):
        raise DataError(
            f"--custom-dataset {spec}: {file} has no class {class_name}; expected a class whose CLASS(path) "
            "yields dicts. Correct the name."
        )
    return named
