"""What a token store depends on, as one hash: data, tokenizer, template, policy, length, code.

Not here: the store itself (tokens.py).
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sft import __version__
from megatron_sft.config.run import DataConfig
from megatron_sft.data.store import STORE_VERSION

POLICY_FIELDS = (
    "data_split",
    "trust_remote_code",
    "seq_length",
    "truncation",
    "train_on",
    "train_on_tool_calls",
    "history_thinking",
    "role_map",
    "data_schema",
    "input_key",
    "tool_key",
    "prompt_key",
    "response_key",
    "prompt_dict_keys",
    "response_dict_keys",
    "custom_dataset",
    "max_bad_rows",
)
CODE_FILES = tuple(
    f"{name}.py" for name in "limits schema sources json_rows chat spans templates tokenizer fast_bpe tokens".split()
)
WHOLE_FILE_BYTES = 64 * 2**20
PART_BYTES = 2**20


def store_fingerprint(config: DataConfig, sources: Sequence[Any]) -> str:
    """sha256, 64 hex digits. The same inputs give the same value."""
    here = Path(__file__).parent
    parts = {
        "store": STORE_VERSION,
        "version": __version__,
        "code": [_file_hash(here / name) for name in CODE_FILES if (here / name).exists()],
        "policy": {name: getattr(config, name) for name in POLICY_FIELDS},
        "tokenizer": _tokenizer_identity(config.tokenizer_model),
        "template": _text_or_file(config.chat_template),
        "custom_dataset": _file_hash(Path(config.custom_dataset.rpartition(":")[0])) if config.custom_dataset else None,
        "sources": [[source.name, source.path, [_data_file(path) for path in _files_of(source)]] for source in sources],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()


def _files_of(source: Any) -> list[str]:
    """The files that are read; for a class of the user's own, those at the path that it is given."""
    if source.files or os.path.isfile(source.path):
        return list(source.files) or [source.path]
    return sorted(os.path.join(top, name) for top, _, names in os.walk(source.path) for name in names)


def _data_file(path: str) -> list[Any]:
    """Path, size, mtime and content (all of it up to 64 MiB, head and tail above)."""
    stat = os.stat(path)
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, _file_hash(Path(path))]


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE_FILE_BYTES:
            while block := file.read(PART_BYTES):
                digest.update(block)
        else:
            digest.update(file.read(PART_BYTES))
            file.seek(size - PART_BYTES)
            digest.update(file.read(PART_BYTES))
    return digest.hexdigest()


def _tokenizer_identity(tokenizer_model: str) -> Any:
    """Hashes of the tokenizer's files (not of weights that lie beside them), or the hub name."""
    path = Path(tokenizer_model)
    if not tokenizer_model or not path.exists():
        return tokenizer_model
    if path.is_file():
        return _file_hash(path)
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
    files = sorted({file for name in names for file in path.glob(name) if file.is_file()})
    return [[file.name, _file_hash(file)] for file in files]


def _text_or_file(template: str | None) -> str | None:
    """The template's text: itself, or the content of the file that it names."""
    if template is None or "{" in template or not os.path.isfile(template):
        return template
    return _file_hash(Path(template))
