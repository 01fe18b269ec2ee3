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
from typing import Any

MANIFEST = "manifest.json"
MEGATRON_MANIFEST = "integrity.json"
_CHUNK_BYTES = 4 << 20


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
        for start in range(0, view.nbytes, _CHUNK_BYTES):
            if self._error is not None:
                break
            chunk = view[start : start + _CHUNK_BYTES]
            try:
                written = os.write(self._descriptor, chunk)
                while written < chunk.nbytes:
                    written += os.write(self._descriptor, chunk[written:])
            except OSError as error:
                self._error = error
            self._crc = zlib.crc32(chunk, self._crc)
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
        content: read and checksum the files; otherwise only presence and size are looked at.
        share: (index, number) of the process that asks; the files are divided among them.
    """
    if not (folder / "metadata.json").is_file():
        return [f"{folder}: no metadata.json; it is not a whole torch_dist checkpoint"]
    try:
        files = _read_manifest(folder)
    except FileNotFoundError:
        return _megatron_problems(folder) if content and share[0] == 0 else []
    except (ValueError, KeyError, TypeError) as error:
        return [f"{folder / MANIFEST}: {error or 'unreadable'}; expected the manifest that was written with it"]
    mine = sorted(files.items(), key=lambda file: -file[1][0])[share[0] :: share[1]]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        found = pool.map(lambda file: _file_problem(folder / file[0], file[1][0], file[1][1], content), mine)
        return [problem for problem in found if problem]


def _read_manifest(folder: Path) -> dict[str, tuple[int, int]]:
    """{file name: (bytes, crc32)}; ValueError when the manifest itself is damaged."""
    data = json.loads((folder / MANIFEST).read_bytes().decode("utf-8"))
    files = data["files"]
    if data["algorithm"] != "crc32" or data["crc32"] != _entry_crc(files) or set(data) != {"algorithm", "files", "crc32"}:
        raise ValueError("its own checksum does not match")
    if any(Path(name).name != name for name in files):
        raise ValueError("it names a file outside its folder")
    return {name: (int(entry["bytes"]), int(entry["crc32"], 16)) for name, entry in files.items()}


def _file_problem(path: Path, size_bytes: int, crc32: int, content: bool) -> str | None:
    try:
        found = path.stat().st_size
        if found != size_bytes:
            return f"{path}: {found} bytes; expected {size_bytes}"
        if content and (found_crc := _crc_of(path)) != crc32:
            return f"{path}: crc32 {found_crc:08x}; expected {crc32:08x}"
    except OSError as error:
        return f"{path}: {error.strerror}; expected {size_bytes} bytes"
    return None


def _crc_of(path: Path) -> int:
    crc, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
    return crc


def _megatron_problems(folder: Path) -> list[str]:
    """The same for a checkpoint of Megatron-LM; nothing to say when it was saved without --verify-integrity."""
    path = folder / MEGATRON_MANIFEST
    if not path.is_file():
        return []
    try:
        files = dict(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path}: {error or 'unreadable'}; expected Megatron-LM's integrity manifest"]
    found = []
    for name, expected in files.items():
        if not (folder / name).is_file():
            found.append(f"{folder / name}: missing")
            continue
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            found.append(f"{folder / name}: sha256 {digest[:16]}; expected {str(expected)[:16]}")
    return found
