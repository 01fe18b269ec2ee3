import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_sft.config.run import DataConfig
from megatron_sft.data import tokens as tokens_module
from megatron_sft.data.fingerprint import store_fingerprint
from megatron_sft.data.schema import RowError
from megatron_sft.data.sources import open_source
from megatron_sft.data.store import FILES, TokenStore, write_meta
from megatron_sft.data.tokens import build_memory_store, build_token_store, fit
from megatron_sft.errors import DataError
from megatron_sft.lock import only_one

ACTIONS = {
    "poison": lambda: os._exit(7),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "late": lambda: os.kill(os.getpid(), signal.SIGPROF),  # as trial.clock does
    "hog": lambda: bytearray(2**31),
}


class WordEncoder:
    """One token a word, its id the word's checksum; assistant words are trained, with the message's weight if any."""

    def encode(self, row):
        tokens, mask = [], []
        for message in row.messages:
            if action := ACTIONS.get(message["content"]):
                action()
            words = message["content"].split()
            tokens += [zlib.crc32(word.encode()) % 50_000 for word in words]
            mask += [message.get("weight", 1) if message["role"] == "assistant" else 0] * len(words)
        is_weighted = any("weight" in message for message in row.messages)
        return [
            SimpleNamespace(tokens=np.array(tokens, np.int32), loss_mask=np.array(mask, np.float32 if is_weighted else np.uint8))
        ]


def make_word_encoder(config, sample):
    return WordEncoder()


def chat(question, answer, **assistant):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **assistant}]}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def build(tmp_path, rows, name="rows.jsonl", **settings):
    config = DataConfig(seq_length=settings.pop("seq_length", 8), num_workers=settings.pop("num_workers", 1), **settings)
    source = open_source(write(tmp_path / name, rows), config)
    return build_token_store(config, [source], tmp_path / "cache", make_word_encoder)


def sample(length, trained):
    mask = np.zeros(length, np.uint8)
    mask[trained] = 1
    return SimpleNamespace(tokens=np.arange(length, dtype=np.int32), loss_mask=mask)


@pytest.mark.parametrize(
    "truncation, pieces, fate, lost",
    [
        ("right", [[0, 1, 2, 3]], "truncated", 6),
        ("left", [[6, 7, 8, 9]], "truncated", 6),
        ("split", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], "split", 0),
        ("drop", [], "dropped:longer than seq_length", 10),
    ],
)
def test_long_rows_are_cut_as_told(truncation, pieces, fate, lost):
    documents, found, cut = fit([sample(10, slice(0, 10))], 4, truncation, "f:1")
    assert ([d.tokens.tolist() for d in documents], found, cut) == (pieces, fate, lost)


def test_long_rows_are_an_error_by_default():
    with pytest.raises(RowError) as error:
        fit([sample(10, slice(5, 10))], 4, "error", "f.jsonl:3")
    assert str(error.value) == (
        "f.jsonl:3: the row has 10 tokens; expected at most --seq-length 4. Raise --seq-length, or choose "
        "--truncation right, left, drop or split."
    )


def test_pieces_without_a_trained_token_are_left_out():
    documents, fate, lost = fit([sample(10, slice(8, 10))], 4, "split", "f:1")
    assert [d.tokens.tolist() for d in documents] == [[8, 9]] and (fate, lost) == ("split", 8)
    assert fit([sample(10, slice(8, 10))], 4, "right", "f:1") == ([], "dropped:no trained token", 10)
    assert fit([sample(4, slice(0, 1))], 4, "right", "f:1") == ([], "dropped:no trained token", 4)


def test_one_row_of_several_samples_has_one_fate():
    documents, fate, _ = fit([sample(3, slice(1, 3)), sample(6, slice(1, 6))], 4, "right", "f:1")
    assert len(documents) == 2 and fate == "truncated"
    documents, fate, _ = fit([sample(3, slice(1, 3)), sample(6, slice(1, 6))], 4, "drop", "f:1")
    assert len(documents) == 1 and fate == "truncated", "a part of the row is gone"


def test_store_has_documents_masks_places_and_a_ledger(tmp_path):
    rows = [chat("a b", "c d"), chat("a", "b c d e f g h i j"), chat("x", ""), chat("q", "r", weight=0.5)]
    rows[2]["messages"][1]["content"] = "   "
    store = build(tmp_path, rows, truncation="right")
    documents = [store.document(i) for i in range(len(store))]
    assert [[mask.tolist() for _, mask in documents], store.lengths.tolist()] == [
        [[0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [0, 0.5]],
        [4, 8, 2],
    ]
    assert documents[0].tokens.tolist() == [zlib.crc32(w.encode()) % 50_000 for w in ("a", "b", "c", "d")]
    assert [store.where(i).rpartition("/")[2] for i in range(3)] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:4"]
    assert store.source_ids.tolist() == [0, 0, 0] and store.source_names == ("rows",)
    assert store.ledger == {
        "rows": {
            "rows": 4,
            "kept": 2,
            "truncated": 1,
            "split": 0,
            "dropped": {"no trained token": 1},
            "schemas": {"messages": 4},
            "routes": {},
            "notes": {},
            "documents": 3,
            "tokens": 14,
            "trained_tokens": 10,
            "lost_tokens": 3,
        }
    }


def test_several_processes_give_the_same_store_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "PORTION_ROWS", 16)
    random = np.random.default_rng(0)
    rows = [
        chat("q " * random.integers(1, 9), "a " * random.integers(1, 9), **({"weight": 0.25} if i % 7 == 0 else {}))
        for i in range(300)
    ]
    (tmp_path / "one").mkdir()
    one = build(tmp_path / "one", rows, truncation="split")
    (tmp_path / "three").mkdir()
    three = build(tmp_path / "three", rows, truncation="split", num_workers=3)
    assert one.ledger == three.ledger and one.lengths.tolist() == three.lengths.tolist()
    for name in ("tokens.bin", "loss_mask.bin"):
        assert (one.folder / name).read_bytes() == (three.folder / name).read_bytes()
    assert [one.where(i).rpartition(":")[2] for i in range(len(one))] == [
        three.where(i).rpartition(":")[2] for i in range(len(three))
    ]


@pytest.mark.parametrize(
    ("poison", "told"),
    [
        ("poison", "tokenising the row ended its process (exit code 7)"),
        ("hog", "tokenising the row needs more than 1 GiB"),
        ("late", "the row takes too long to render or tokenise"),
        (
            "killed",
            "tokenising the row alone got its process killed, twice (exit code -9); most likely memory was short, and fewer "
            "--num-workers need less",
        ),
    ],
)
def test_a_row_that_ends_its_process_is_one_bad_row(tmp_path, monkeypatch, poison, told):
    monkeypatch.setattr(tokens_module, "PORTION_ROWS", 16)
    rows = [chat(f"q{i}", "a b" if i % 3 else "a") for i in range(100)]
    whole = build(tmp_path, [row for i, row in enumerate(rows) if i not in (40, 41, 90)], name="whole.jsonl")
    for i in (40, 90):
        rows[i] = chat("q", poison)
    rows[41] = {"messages": []}
    with pytest.raises(DataError) as error:
        build(tmp_path, rows, num_workers=2)
    assert str(error.value) in {  # whichever of two processes meets its row first
        f"{tmp_path}/rows.jsonl:{row}: {told}; expected a row like others. Correct or remove it, or pass another --chat-template."
        for row in (41, 91)
    }
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".lock"}
    store = build(tmp_path, rows, num_workers=2, max_bad_rows=3)
    assert store.row_ids.tolist() == [i for i in range(100) if i not in (40, 41, 90)]
    assert [store.where(i).rpartition(":")[2] for i in range(97)] == [str(i + 1) for i in store.row_ids]
    for name in ("tokens.bin", "loss_mask.bin", "lengths.npy"):
        assert (store.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert store.ledger["rows"]["dropped"] == {"ended its process": 2, "no messages": 1}
    problems = [json.loads(line) for line in (store.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [(p["where"].rpartition(":")[2], p["record"]) for p in problems] == [(str(i + 1), rows[i]) for i in (40, 41, 90)]


def test_a_worker_that_is_killed_once_does_its_rows_again(tmp_path, monkeypatch):
    def killed_once():
        with contextlib.suppress(FileExistsError):
            (tmp_path / "killed").touch(exist_ok=False)
            ACTIONS["killed"]()

    monkeypatch.setattr(tokens_module, "PORTION_ROWS", 16)
    monkeypatch.setitem(ACTIONS, "killed once", killed_once)
    store = build(tmp_path, [chat("q", "killed once" if i == 40 else "a") for i in range(100)], num_workers=2)
    assert len(store) == 100 and (tmp_path / "killed").exists()


def test_bad_rows_stop_after_20_are_listed(tmp_path):
    rows = [chat("q", "a"), *["{"] * 30]
    with pytest.raises(DataError) as error:
        build(tmp_path, rows)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("30 bad rows among the first 31; expected at most 0.") and len(lines) == 21
    assert lines[1].strip().split(" ")[0].endswith("rows.jsonl:2:")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_bad_rows_are_set_aside_when_allowed(tmp_path):
    store = build(tmp_path, [chat("q", "a"), "{", chat("q", "b " * 20)], max_bad_rows=2, truncation="error")
    problems = [json.loads(line) for line in (store.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [(p["reason"], p["where"][-2:]) for p in problems] == [("bad JSON", ":2"), ("longer than seq_length", ":3")]
    entry = store.ledger["rows"]
    assert entry["rows"] == 3 and entry["kept"] == 1
    assert entry["dropped"] == {"bad JSON": 1, "longer than seq_length": 1}


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(DataError, match="no row is left to train on"):
        build(tmp_path, [chat("q " * 8, "a")], truncation="right")
    with pytest.raises(DataError) as raised:
        build(tmp_path, [chat("q " * 8, "a")] * 2, truncation="drop")
    sentence = str(raised.value)
    assert re.match(r"rows: no row is left to train on of 2 \(2 [a-z_ ]+\); expected at least one conversation", sentence)
    assert sentence.endswith("--truncation drop (what becomes of longer rows), the roles and --train-on.")


def test_the_cache_is_used_until_something_changes(tmp_path):
    rows = [chat("q", "a b")]
    first = build(tmp_path, rows)
    stamp = os.stat(first.folder / "store.json").st_mtime_ns
    config = DataConfig(seq_length=8, num_workers=1)
    source = [open_source(str(tmp_path / "rows.jsonl"), config)]
    again = build_token_store(config, source, tmp_path / "cache", make_word_encoder)
    assert again.folder == first.folder and os.stat(again.folder / "store.json").st_mtime_ns == stamp
    other = build_token_store(DataConfig(seq_length=9, num_workers=1), source, tmp_path / "cache", make_word_encoder)
    changed = build(tmp_path, [chat("q", "a c")])
    assert len({first.folder, other.folder, changed.folder}) == 3


ROWS = [chat("q", "a b"), chat("r s", "c d e"), chat("t", "f", weight=0.5)]


def flipped(folder, other, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)


DAMAGE = {
    "one bit": flipped,
    "cut off": lambda folder, other, name: os.truncate(folder / name, (folder / name).stat().st_size - 1),
    "longer": lambda folder, other, name: (folder / name).write_bytes((folder / name).read_bytes() + b"\0"),
    "empty": lambda folder, other, name: os.truncate(folder / name, 0),
    "gone": lambda folder, other, name: (folder / name).unlink(),
    "zeros": lambda folder, other, name: (folder / name).write_bytes(bytes((folder / name).stat().st_size)),
    "ones": lambda folder, other, name: (folder / name).write_bytes(b"\1" * (folder / name).stat().st_size),
    "permuted": lambda folder, other, name: (folder / name).write_bytes((folder / name).read_bytes()[::-1]),
    "of another store": lambda folder, other, name: shutil.copy(other / name, folder / name),
    "a folder": lambda folder, other, name: ((folder / name).unlink(), (folder / name).mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_never_used_and_built_again(tmp_path, caplog, kind):
    config = DataConfig(seq_length=8, num_workers=1)
    source = [open_source(write(tmp_path / "rows.jsonl", ROWS), config)]
    whole = build_token_store(config, source, tmp_path / "cache", make_word_encoder).folder
    content = {path.name: path.read_bytes() for path in whole.iterdir()}
    (tmp_path / "other").mkdir()
    other = build(tmp_path / "other", [ROWS[0], ROWS[0], ROWS[1]]).folder
    for name in (*FILES, "store.json"):
        before = (whole / name).read_bytes()
        DAMAGE[kind](whole, other, name)
        if (whole / name).is_file() and (whole / name).read_bytes() == before:
            continue  # such as lengths of another store with the same ones
        caplog.clear()
        with pytest.raises(DataError, match=r"cache/[0-9a-f]{32}: .*Delete the folder"):
            TokenStore(whole)
        assert build_token_store(config, source, tmp_path / "cache", make_word_encoder).folder == whole
        assert [record.message.endswith("This is done now.") for record in caplog.records if record.levelname == "WARNING"] == [
            True
        ]
        assert {path.name: path.read_bytes() for path in whole.iterdir()} == content
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]


def test_a_damaged_store_that_cannot_be_built_again_is_an_error_that_names_its_folder(tmp_path):
    store = build(tmp_path, ROWS)
    flipped(store.folder, None, "loss_mask.bin")
    store.folder.with_suffix(".lock").unlink()
    store.folder.with_suffix(".lock").mkdir()  # as on a read-only disk, no lock can be taken
    config = DataConfig(seq_length=8, num_workers=1)
    with pytest.raises(DataError) as error:
        build_token_store(config, [open_source(str(tmp_path / "rows.jsonl"), config)], tmp_path / "cache", make_word_encoder)
    assert str(error.value).startswith(
        f"{store.folder}: no whole token store (loss_mask.bin is damaged); expected one as it was written. Delete the folder; it "
        "is built again. That cannot be done now: [Errno 21] Is a directory"
    )


def test_a_store_in_the_place_of_another_is_not_used(tmp_path, caplog):
    first, second = build(tmp_path, ROWS).folder, build(tmp_path, ROWS[:2], name="second.jsonl").folder
    shutil.rmtree(first)
    shutil.copytree(second, first)
    config = DataConfig(seq_length=8, num_workers=1)
    source = [open_source(str(tmp_path / "rows.jsonl"), config)]
    assert len(build_token_store(config, source, tmp_path / "cache", make_word_encoder)) == 3
    assert f"{first}: a store of other data" in caplog.text


WRONG = [
    ("lengths from 1", "lengths.npy", np.array([3, 7, 0], np.int32)),
    ("lengths that add up to tokens and masks", "lengths.npy", np.array([3, 5, 3], np.int32)),
    ("one entry for each in every file", "row_ids.npy", np.arange(2)),
    ("sources that have a name", "source_ids.npy", np.array([0, 0, 1], np.int16)),
    ("ascending rows", "row_ids.npy", np.array([0, 2, 1])),
    ("ascending places", "where_offsets.npy", np.array([0, 9, 5, 30])),
    ("masks that have a weight", "loss_mask.bin", np.array([0, 1, 1, 0, 0, 1, 1, 1, 0, 3], np.uint8)),
    ("trained tokens", "loss_mask.bin", np.zeros(10, np.uint8)),
    ("token ids from 0 to the highest", "tokens.bin", np.array([1, 2, -3, 4, 5, 6, 7, 8, 9, 10], np.int32)),
    ("the ledger's counts", "loss_mask.bin", np.array([0, 1, 1, 0, 0, 1, 1, 1, 1, 2], np.uint8)),
    ("token ids from 0 to the highest", "tokens.bin", np.arange(10, dtype=np.int32)),
]


@pytest.mark.parametrize(("wrong", "name", "values"), WRONG)
def test_a_store_that_was_written_wrong_is_refused(tmp_path, wrong, name, values):
    folder = build(tmp_path, ROWS).folder
    if name.endswith(".npy"):
        np.save(folder / name, values)
    else:
        values.tofile(folder / name)
    meta = json.loads((folder / "store.json").read_text())
    write_meta(folder, {key: meta[key] for key in ("fingerprint", "source_names", "ledger", "max_token_id", "loss_weights")})
    with pytest.raises(DataError, match=rf"of 3 documents these do not hold: .*{wrong}"):
        TokenStore(folder)


def test_what_killed_builds_left_is_swept_but_not_what_is_being_built(tmp_path):
    cache = tmp_path / "cache"
    left, building = cache / f"{'a' * 32}.building", cache / f"{'b' * 32}.building"
    for folder in (left, building):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"1")
    with only_one(building.with_suffix(".lock"), "the other store"):
        build(tmp_path, ROWS)
    assert not left.exists() and building.exists()


def test_a_store_in_a_folder_that_cannot_be_written_is_opened(tmp_path):
    store = build(tmp_path, [chat("q", "a b")])
    lock = store.folder.with_suffix(".lock")
    lock.unlink()
    lock.mkdir()  # as on a read-only disk, no lock can be taken
    config = DataConfig(seq_length=8, num_workers=1)
    source = open_source(str(tmp_path / "rows.jsonl"), config)
    assert build_token_store(config, [source], tmp_path / "cache", make_word_encoder).folder == store.folder


def test_a_custom_class_s_data_is_part_of_the_fingerprint(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n def __init__(self, path): pass\n")
    config = DataConfig(custom_dataset=f"{tmp_path}/mine.py:Mine")
    found = set()
    for text in ("a", "b"):
        (tmp_path / "rows.txt").write_text(text)
        paths = (str(tmp_path / "rows.txt"), str(tmp_path))
        found |= {store_fingerprint(config, [open_source(path, config)]).value for path in paths}
    assert len(found) == 4


def slow_encoder(config, sample):
    with open(os.environ["BUILDS"], "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.5)
    return WordEncoder()


def build_alone(path, folder):
    config = DataConfig(seq_length=8, num_workers=1)
    build_token_store(config, [open_source(path, config)], folder, slow_encoder)


def test_one_process_builds_and_the_others_wait(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [chat("q", "a b")])
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_alone, args=(path, tmp_path / "cache")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "builds").read_text().splitlines()) == 1


def test_memory_store_is_the_same(tmp_path):
    rows = [chat("a b", "c d"), chat("a", "b c d e f g h i j"), chat("q", "r")]
    store = build(tmp_path, rows, truncation="split")
    config = DataConfig(seq_length=8, truncation="split")
    memory = build_memory_store(config, [open_source(str(tmp_path / "rows.jsonl"), config)], WordEncoder())
    assert memory.ledger == store.ledger and memory.lengths.tolist() == store.lengths.tolist()
    assert [memory.where(i) for i in range(len(memory))] == [store.where(i) for i in range(len(store))]


class TurnEncoder(WordEncoder):
    """A sample for every assistant message, as history_thinking=expand has it."""

    def encode(self, row):
        turns = sum(message["role"] == "assistant" for message in row.messages)
        return super().encode(row) * turns


def test_documents_know_their_row_over_portions_sources_and_bad_rows(tmp_path, monkeypatch):
    """Rows 0 to 4 and 5 to 6; row 1 is bad, 0 and 6 have two turns, 3 is cut into two pieces."""
    monkeypatch.setattr(tokens_module, "PORTION_ROWS", 2)
    twice = {"messages": [*chat("a", "b")["messages"], *chat("c", "d")["messages"]]}
    first = [twice, {"messages": "no"}, chat("a", "b"), chat("a", "b c d e f g h i j"), chat("a", "b")]
    config = DataConfig(seq_length=8, num_workers=1, max_bad_rows=1, truncation="split")
    paths = [write(tmp_path / "first.jsonl", first), write(tmp_path / "second.jsonl", [chat("a", "b"), twice])]
    sources = [open_source(path, config) for path in paths]
    store = build_token_store(config, sources, tmp_path / "cache", lambda *_: TurnEncoder())
    expected = [0, 0, 2, 3, 3, 4, 5, 6, 6]
    assert store.row_ids.tolist() == TokenStore(store.folder).row_ids.tolist() == expected
    assert store.row_ids.dtype == np.int64 and store.source_ids.tolist() == [0] * 6 + [1] * 3
    assert build_memory_store(config, sources, TurnEncoder()).row_ids.tolist() == expected


def test_content_is_that_of_the_tokens_wherever_they_come_from(tmp_path):
    rows = [chat("a b", "c d"), chat("a", "b")]
    first, moved, more = (
        build(tmp_path, rows),
        build(tmp_path, rows, name="moved.jsonl"),
        build(tmp_path, rows[:1], name="less.jsonl"),
    )
    assert len({store.fingerprint for store in (first, moved, more)}) == 3 and first.source_names != moved.source_names
    assert first.content == moved.content != more.content
