"""Checksums of a checkpoint's files, taken while they are written, and their verification.

manifest.json: {"algorithm": "crc32", "files": {name: {"bytes": n, "crc32": "89abcdef"}}, "crc32": of the files entry}.
CRC-32 finds every flipped bit and every burst of up to 32 bits; it runs at 4 GB/s a core, where SHA-256 does 1.4. It
protects against damage, not against malice: that is what torch_dist.py's restricted readers are for.
Megatron-LM's integrity.json (SHA-256, megatron/core/dist_checkpointing/validation.py) is verified too, never written.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_sft.checkpoint.reading import is_plain_name, open_regular, read_limited

MANIFEST = "manifest.json"
MEGATRON_MANIFEST = "integrity.json"
RUN_CONFIG = "run_config.json"
_SMALL = (RUN_CONFIG, ".metadata", "common.pt", "metadata.json")
_PIECE_BYTES = 4 << 20
_SMALL_BYTES = 1 << 20
_MANIFEST_BYTES = 1 << 28
_ANY_SIZE = -1
Files = dict[str, tuple[int, str, str]]
"""{name: (bytes, algorithm, checksum)}"""


@dataclass(frozen=True)
class FileRecord:
    """One written file: its name in the checkpoint, size and checksum."""

    name: str
    size_bytes: int
    crc32: int


class ChecksumFile:
    """A file to write that counts and checksums its bytes. An error is kept for `close`, not raised.

    torch.save's C++ writer ends the process when a write raises inside it, so `write` only remembers the first error
    and swallows what follows.
    """

    def __init__(self, path: Path):
        self._path = path
        self._crc = 0
        self._size = 0
        self._error: OSError | None = None
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    @property
    def failed(self) -> bool:
        return self._error is not None

    def tell(self) -> int:
        """Bytes taken so far."""
        return self._size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._size += view.nbytes
        for start in range(0, view.nbytes, _PIECE_BYTES):
            if self._error is not None:
                break
            part = view[start : start + _PIECE_BYTES]
            try:
                written = os.write(self._descriptor, part)
                while written < part.nbytes:
                    written += os.write(self._descriptor, part[written:])
            except OSError as error:
                self._error = error
            self._crc = zlib.crc32(part, self._crc)
        return view.nbytes

    def flush(self) -> None:
        """Nothing is buffered; torch.save calls this."""

    def close(self) -> FileRecord:
        """Makes the file durable and returns its record.

        Raises:
            OSError: the first error of any write, or of this flush to disk.
        """
        try:
            if self._error is None:
                os.fsync(self._descriptor)
        except OSError as error:
            self._error = error
        os.close(self._descriptor)
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path))
        return FileRecord(self._path.name, self._size, self._crc)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Writes a small file durably and returns its record."""
    file = ChecksumFile(path)
    file.write(data)
    return file.close()


def write_manifest(folder: Path, records: list[FileRecord]) -> None:
    """Writes manifest.json, the last file of a checkpoint."""
    files = {r.name: {"bytes": r.size_bytes, "crc32": f"{r.crc32:08x}"} for r in sorted(records, key=lambda r: r.name)}
    text = json.dumps({"algorithm": "crc32", "files": files, "crc32": _entry_crc(files)}, indent=1)
    write_file(folder / MANIFEST, text.encode())


def _entry_crc(files: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"


def problems(folder: Path, content: bool, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Why a checkpoint must not be used, by its manifest; an empty list when nothing speaks against it.

    Args:
        folder: iter_%07d or release.
        content: read and checksum every file; otherwise those of at most 1 MiB, of the others presence and size.
        share: (index, number) of the process that asks; the files are divided among them.
    """
    if not (folder / "metadata.json").is_file():
        return [f"{folder}: no metadata.json; it is not a whole torch_dist checkpoint"]
    if os.path.lexists(folder / MANIFEST):
        path, listed = folder / MANIFEST, _our_files
    elif os.path.lexists(folder / RUN_CONFIG):
        return [f"{folder}: {RUN_CONFIG} without the {MANIFEST} that was written with it; expected both"]
    elif os.path.lexists(folder / MEGATRON_MANIFEST) and content:
        path, listed = folder / MEGATRON_MANIFEST, _megatron_files
    else:  # Megatron-LM's without --verify-integrity
        return []
    try:
        files = listed(json.loads(read_limited(path, _MANIFEST_BYTES)))
    except (OSError, ValueError, RecursionError) as error:
        return [f"{path}: {error}; expected the manifest that was written with it"]
    if path.name == MANIFEST and (unlisted := [name for name in _SMALL if name not in files and os.path.lexists(folder / name)]):
        return [f"{path}: does not list {', '.join(unlisted)}; expected every file with its checksum"]
    mine = sorted(files.items(), key=lambda file: file[1], reverse=True)[share[0] :: share[1]]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        checked = pool.map(lambda file: _file_problem(folder / file[0], file[1], content), mine)
        return [problem for problem in checked if problem]


def _our_files(data: Any) -> Files:
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or data != {"algorithm": "crc32", "files": files, "crc32": _entry_crc(files)}:
        raise ValueError("its own checksum does not match")
    for name, entry in files.items():
        if not is_plain_name(name):
            raise ValueError("it names a file outside its folder")
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get("crc32"), str):
            raise ValueError(f"{name} has no size and checksum")
    return {name: (entry["bytes"], "crc32", entry["crc32"]) for name, entry in files.items()}


def _megatron_files(data: Any) -> Files:
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or not all(is_plain_name(name) and isinstance(files[name], str) for name in files):
        raise ValueError("it does not list files of its folder and their checksums")
    return {name: (_ANY_SIZE, "sha256", files[name]) for name in files}


def _file_problem(path: Path, entry: tuple[int, str, str], content: bool) -> str | None:
    size_bytes, algorithm, expected = entry
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size_bytes not in (size, _ANY_SIZE):
                return f"{path}: {size} bytes; expected {size_bytes}"
            if (content or size <= _SMALL_BYTES) and (found := _checksum(file, algorithm)) != expected:
                return f"{path}: {algorithm} {found[:16]}; expected {expected[:16]}"
    except OSError as error:
        return f"{path}: {error.strerror}; expected the file that the manifest lists"
    return None


def _checksum(file: BinaryIO, algorithm: str) -> str:
    if algorithm == "sha256":
        return hashlib.file_digest(file, algorithm).hexdigest()  # type: ignore[arg-type]  # unbuffered files have readinto
    crc, buffer = 0, memoryview(bytearray(_PIECE_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        crc = zlib.crc32(buffer[:count], crc)
    return f"{crc:08x}"
