"""Kills `prepare` (the building of a token store, all its processes) at random moments; the next run must be right.

    python tests/soak/kill_prepare.py [KILLS]      50 by default; prints one line a kill, exits 1 on any wrong store

Not a unit test: it takes a few minutes. After each kill the same command runs again, and its store is
compared byte by byte with a store that was built undisturbed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.schema import Row
from megatron_sft.data.sources import open_source
from megatron_sft.data.store import Document
from megatron_sft.data.tokens import HASHES, build_token_store

ROWS = 6000
FILES = (
    "tokens.bin",
    "loss_mask.bin",
    "lengths.npy",
    "source_ids.npy",
    "row_ids.npy",
    "where.bin",
    "where_offsets.npy",
    "store.json",
)


class WordEncoder:
    """One token a word: the store is what is tested, not the tokenizer."""

    def encode(self, row: Row) -> list[Document]:
        words = [(word, m["role"] == "assistant") for m in row.messages for word in m["content"].split()]
        tokens = np.array([zlib.crc32(word.encode()) % 50_000 for word, _ in words], dtype=np.int32)
        return [Document(tokens, np.array([trained for _, trained in words], dtype=np.uint8))]


def make_word_encoder(config: DataConfig, sample: Sequence[Any]) -> WordEncoder:
    return WordEncoder()


def write_rows(path: Path) -> None:
    with open(path, "w", encoding="ascii") as file:
        for i in range(ROWS):
            turns = [
                {"role": "user", "content": f"question {i} " * 9},
                {"role": "assistant", "content": f"answer {i} " * 60},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def prepare(data: str, cache: str) -> None:
    config = DataConfig(seq_length=4096, num_workers=2)
    build_token_store(config, [open_source(data, config)], cache, make_word_encoder)


def start(data: Path, cache: Path) -> "subprocess.Popen[bytes]":
    """A process group of its own, so that one kill reaches the workers or spares them."""
    command = [sys.executable, __file__, "--prepare", str(data), str(cache)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def content(cache: Path) -> dict[str, bytes]:
    (folder,) = [path for path in cache.iterdir() if path.is_dir() and path.name != HASHES]
    assert folder.suffix == "", f"{folder}: a temporary folder was left by a build that succeeded"
    return {name: (folder / name).read_bytes() for name in FILES}


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    work = Path(tempfile.mkdtemp(prefix="kill_prepare."))
    data = work / "rows.jsonl"
    write_rows(data)
    begin = time.monotonic()
    assert start(data, work / "whole").wait() == 0, "an undisturbed build succeeds"
    whole_s = time.monotonic() - begin
    expected = content(work / "whole")
    choice, wrong, interrupted = random.Random(0), 0, 0
    for kill in range(kills):
        cache = work / f"cache{kill}"
        process = start(data, cache)
        at_s = choice.uniform(0.3, 1.05) * whole_s
        time.sleep(at_s)
        is_group = kill % 2 == 0
        if process.poll() is None:
            interrupted += 1
            (os.killpg if is_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        finished = start(data, cache).wait() == 0
        is_right = finished and content(cache) == expected
        wrong += not is_right
        print(
            f"kill {kill + 1} at {at_s:.2f} s, {'all' if is_group else 'parent'}: {'right' if is_right else 'WRONG'}",
            flush=True,
        )
        shutil.rmtree(cache)
    print(f"{kills - wrong} of {kills} right ({interrupted} interrupted a build of {whole_s:.1f} s)")
    shutil.rmtree(work)
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(sys.argv[2], sys.argv[3])
    else:
        sys.exit(main())
