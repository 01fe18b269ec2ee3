"""Damages a token store at random: opening it is refused, or gives what was written.

PYTHONPATH=. python tests/soak/damage_store.py [TRIALS]      1,500 by default; 1 for a store that gives something else
"""

import collections
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.sources import open_source
from megatron_sft.data.store import FILES, TokenStore
from megatron_sft.data.tokens import build_token_store
from megatron_sft.errors import DataError
from tests.soak.kill_prepare import make_word_encoder

KINDS = ("byte", "cut", "gone", "swap", "zeros", "words", "pages")


def built(folder: Path, first: int) -> Path:
    """A store of 60 rows, of which some are cut in two."""
    folder.mkdir()
    with open(folder / "rows.jsonl", "w", encoding="ascii") as file:
        for i in range(first, first + 60):
            turns = [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i} " * (i % 9 + 1)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    config = DataConfig(seq_length=12, truncation="split", num_workers=1)
    return build_token_store(config, [open_source(str(folder / "rows.jsonl"), config)], folder, make_word_encoder).folder


def damage(choice: random.Random, kind: str, path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    place = choice.randrange(len(content))
    if kind == "byte":
        content[place] = choice.randrange(256)
    elif kind == "cut":
        del content[place:]
    elif kind == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif kind == "words":
        a, b = (4 * choice.randrange(max(len(content) // 4, 1)) for _ in range(2))
        content[a : a + 4], content[b : b + 4] = content[b : b + 4], content[a : a + 4]
    elif kind == "pages":
        half = len(content) // 2
        content = content[half:] + content[:half]
    elif kind == "swap":
        content = bytearray((other / path.name).read_bytes())
    path.unlink() if kind == "gone" else path.write_bytes(content)


def read(folder: Path) -> str:
    """All that training takes from a store, as a hash."""
    store = TokenStore(folder)
    parts = [part.tobytes() for i in range(len(store)) for part in store.document(i)]
    arrays = [np.asarray(a).tobytes() for a in (store.lengths, store.source_ids, store.row_ids)]
    texts = [store.where(i).partition("/rows")[2].encode() for i in range(len(store))]
    said = json.dumps([store.fingerprint, store.source_names, store.ledger, store.max_token_id], sort_keys=True)
    return hashlib.sha256(b"".join([*parts, *arrays, *texts, said.encode()])).hexdigest()


def main() -> int:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    work, choice, found = Path(tempfile.mkdtemp(prefix="damage_store.")), random.Random(0), collections.Counter()
    whole, other = built(work / "one", 0), built(work / "two", 100)
    expected, start = read(whole), time.monotonic()
    for _ in range(trials):
        kind, name = choice.choice(KINDS), choice.choice([*FILES, "store.json"])
        shutil.copytree(whole, work / "damaged")
        damage(choice, kind, work / "damaged" / name, other)
        try:
            fate = "as written" if read(work / "damaged") == expected else f"WRONG ({kind} of {name})"
        except DataError:
            fate = "refused"
        found[fate] += 1
        shutil.rmtree(work / "damaged")
    shutil.rmtree(work)
    print(f"{trials} trials in {time.monotonic() - start:.0f} s: {dict(found)}")
    return 1 if any(fate.startswith("WRONG") for fate in found) else 0


if __name__ == "__main__":
    sys.exit(main())
