"""What a token store depends on, as one hash: data, tokenizer, template, policy, length, code.

Files go in by their whole content; their times count only for telling whether they changed since. A data set or tokenizer of
the hub goes in by its name and the commit that this stands for at the moment. Not here: the store itself (tokens.py).
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sft import __version__
from megatron_sft.config.run import ROW_FIELDS, DataConfig
from megatron_sft.data.sources import hub_commit
from megatron_sft.data.store import STORE_VERSION
from megatron_sft.errors import DataError
from megatron_sft.lock import only_one

POLICY_FIELDS = (
    "data_split",
    "data_config",
    "trust_remote_code",
    "seq_length",
    "truncation",
    "train_on",
    "train_on_tool_calls",
    "history_thinking",
    "empty_thinking",
    "special_in_content",
    "role_map",
    *ROW_FIELDS,
)
CODE_FILES = tuple(
    f"{name}.py"
    for name in "limits schema sources json_rows chat spans traced templates tokenizer fast_bpe literal tokens".split()
)
KEPT_HASH_BYTES = 2**20
"""Of larger files the hash is kept: reading 100 GB anew at every start takes minutes."""
SETTLED_S = 60.0
"""A file that has only just changed may change again and keep its times; only older ones have their hash kept."""

Identity = tuple[int, int, int, int]
"""inode, bytes, mtime_ns and ctime_ns, of which the last cannot be set back. No device: it has another number on each node."""


class Fingerprint(NamedTuple):
    """What a store depends on, at one moment."""

    value: str
    """sha256, 64 hex digits. The same inputs give the same value."""
    files: dict[str, Identity]
    """Of every file that went into it: two that are equal saw no other content in between."""


class _Files:
    """Content hashes of files, and the identities that those files had.

    Args:
        folder: where hashes are kept, one file each, by path and identity; None, or not writable: none are.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self.identities: dict[str, Identity] = {}

    def hash(self, path: str | Path) -> str:
        """sha256 of the whole content, 64 hex digits.

        Raises:
            DataError: it changes while it is read, or cannot be read.
        """
        place = os.path.abspath(path)
        try:
            with open(place, "rb") as file:
                before = self.identities[place] = _identity(file)
                value = self._kept(place, file, before)
                if _identity(file) != before:
                    raise DataError(f"{place}: changes while it is read; expected a whole file. Wait until it is written.")
        except OSError as error:
            raise DataError(
                f"{place}: cannot be read ({error.strerror}); expected a file. Correct its rights, or the path."
            ) from None
        return value

    def _kept(self, place: str, file: BufferedReader, identity: Identity) -> str:
        if self._folder is None or identity[1] <= KEPT_HASH_BYTES or time.time() - identity[3] / 1e9 < SETTLED_S:
            return hashlib.file_digest(file, "sha256").hexdigest()
        entry = self._folder / hashlib.sha256(json.dumps([place, identity]).encode()).hexdigest()[:32]
        if value := _entry(entry):
            return value
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with only_one(entry, f"the hash of {place}"):
                value = _entry(entry) or hashlib.file_digest(file, "sha256").hexdigest()
                entry.write_text(value, encoding="ascii")
        except OSError:  # the cache may be read-only, and files are then hashed every time
            file.seek(0)
            value = hashlib.file_digest(file, "sha256").hexdigest()
        return value


def _entry(path: Path) -> str:
    """A hash that was kept, or nothing."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return text if re.fullmatch("[0-9a-f]{64}", text) else ""


def _identity(file: BufferedReader) -> Identity:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def store_fingerprint(config: DataConfig, sources: Sequence[Any], hashes: Path | None = None) -> Fingerprint:
    """What the store of `sources` depends on.

    Args:
        config: how rows become tokens.
        sources: sources.Source objects.
        hashes: folder that keeps hashes of large files; None: every file is read.

    Raises:
        DataError: a file changes while it is read, or cannot be read.
    """
    here, files = Path(__file__).parent, _Files(hashes)
    parts = {
        "store": STORE_VERSION,
        "version": __version__,
        "code": [files.hash(here / name) for name in CODE_FILES if (here / name).exists()],
        "policy": {name: getattr(config, name) for name in POLICY_FIELDS},
        "tokenizer": _tokenizer_identity(config.tokenizer_model, files),
        "template": _text_or_file(config.chat_template, files),
        "custom_dataset": files.hash(config.custom_dataset.rpartition(":")[0]) if config.custom_dataset else None,
        "sources": [
            [s.name, s.path, s.splits, s.commit(), [[os.path.abspath(path), files.hash(path)] for path in _files_of(s)]]
            for s in sources
        ],
    }
    value = hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()
    return Fingerprint(value, files.identities)


def require_unchanged(before: Fingerprint, now: Fingerprint) -> None:
    """Raises a DataError that names what was written, replaced, added or removed between two fingerprints."""
    if before != now:
        names = sorted(name for name in before.files | now.files if before.files.get(name) != now.files.get(name))
        names = names or ["a file of the data, the template or the tokenizer"]  # within one tick of the file system's clock
        raise DataError(
            f"{', '.join(names[:8])}: changed while rows were read; expected files that stay as they are. Nothing was kept: "
            "run again when they are written."
        )


def _files_of(source: Any) -> list[str]:
    """The files that are read; for a class of the user's own, those at the path that it is given."""
    if source.files or os.path.isfile(source.path):
        return list(source.files) or [source.path]
    paths = (os.path.join(top, name) for top, _, names in os.walk(source.path) for name in names)
    return sorted(path for path in paths if os.path.isfile(path))


def _tokenizer_identity(tokenizer_model: str, files: _Files) -> Any:
    """Hashes of the tokenizer's files (not of weights that lie beside them), or the hub name and its commit."""
    path = Path(tokenizer_model)
    if not tokenizer_model or not path.exists():
        return [tokenizer_model, hub_commit(tokenizer_model, "model")] if tokenizer_model else tokenizer_model
    if path.is_file():
        return files.hash(path)
    names = (
        "token*",
        "vocab*",
        "merges*",
        "special_tokens*",
        "added_tokens*",
        "chat_template*",
        "*.tiktoken",
        "*.model",
        "*.spm",
        "tekken*",
        "bpe*",
        "config.json",
    )
    paths = sorted({file for name in names for file in path.glob(name) if file.is_file()})
    return [[file.name, files.hash(file)] for file in paths]


def _text_or_file(template: str | None, files: _Files) -> str | None:
    """The template's text: itself, or the content of the file that it names."""
    if template is None or "{" in template or not os.path.isfile(template):
        return template
    return files.hash(template)
