"""A store is that of the content that was read, whatever happens to the files meanwhile and whatever their times say."""

import json
import logging
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_sft.config.run import DataConfig
from megatron_sft.data import fingerprint as fingerprint_module
from megatron_sft.data.fingerprint import store_fingerprint
from megatron_sft.data.sources import Source, hub_commit, open_source
from megatron_sft.data.tokens import build_token_store
from megatron_sft.errors import DataError
from tests.unit.data.test_tokens import ROWS, WordEncoder, chat, make_word_encoder, write

CONFIG = DataConfig(seq_length=8, num_workers=1)
OTHER = [chat("q", "z b"), *ROWS[1:]]


def same_times(path, like):
    os.utime(path, ns=(like.st_atime_ns, like.st_mtime_ns))


def replaced(path, like):
    other = write(path.with_name("other"), OTHER)
    same_times(other, like)
    os.replace(other, path)


def rewritten(path, like):
    write(path, OTHER)
    same_times(path, like)


CHANGES = {
    "replaced": replaced,
    "rewritten": rewritten,
    "longer": lambda path, like: write(path, [*ROWS, ROWS[0]]),
    "gone and back": lambda path, like: (os.rename(path, path.with_name("away")), os.rename(path.with_name("away"), path)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_fingerprint_and_reading_is_never_cached(tmp_path, change):
    path = tmp_path / "rows.jsonl"
    source = [open_source(write(path, ROWS), CONFIG)]

    def make(config, sample):  # called when the fingerprint is taken, before the rows are read
        time.sleep(0.05)  # a tick of the file system's clock
        CHANGES[change](path, os.stat(path))
        return WordEncoder()

    with pytest.raises(DataError, match=rf"^{path}: changed while rows were read; .* Nothing was kept: run again"):
        build_token_store(CONFIG, source, tmp_path / "cache", make)
    assert [item.suffix for item in (tmp_path / "cache").iterdir()] == [".lock"]
    store = build_token_store(CONFIG, source, tmp_path / "cache", make_word_encoder)
    rows = {"replaced": OTHER, "rewritten": OTHER, "longer": [*ROWS, ROWS[0]], "gone and back": ROWS}[change]
    expected = [token for row in rows for sample in WordEncoder().encode(as_row(row)) for token in sample.tokens]
    assert [token for i in range(len(store)) for token in store.document(i).tokens] == expected


def as_row(record):
    from megatron_sft.data.schema import to_row

    return to_row(record, "", CONFIG)


def test_another_file_for_a_moment_is_seen(tmp_path):
    """A: fingerprint, B: rows, then A again with the times that it had."""
    path, away = tmp_path / "rows.jsonl", tmp_path / "away"
    source = [open_source(write(path, [*ROWS, chat("last", "row")]), CONFIG)]

    class PutsBack(WordEncoder):
        def encode(self, row):
            if row.messages[0]["content"] == "last":
                os.replace(away, path)
            return super().encode(row)

    def make(config, sample):
        time.sleep(0.05)
        os.rename(path, away)
        write(path, [*OTHER, chat("last", "row")])
        return PutsBack()

    with pytest.raises(DataError, match="changed while rows were read"):
        build_token_store(CONFIG, source, tmp_path / "cache", make)


def big(path, word):
    """66 MiB, of which one word in the middle differs."""
    row = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "%s"}]}' % word
    path.write_bytes(b"\n" * (33 * 2**20) + row + b"\n" * (33 * 2**20))


def test_a_large_file_of_the_same_size_and_time_is_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint_module, "SETTLED_S", 0.0)
    path = tmp_path / "rows.jsonl"
    big(path, b"one")
    source, like = [open_source(str(path), CONFIG)], os.stat(path)
    first = build_token_store(CONFIG, source, tmp_path / "cache", make_word_encoder)
    big(path, b"two")
    same_times(path, like)
    second = build_token_store(CONFIG, source, tmp_path / "cache", make_word_encoder)
    assert first.folder != second.folder and first.document(0).tokens[1] != second.document(0).tokens[1]


def test_times_alone_change_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    source = [open_source(write(path, ROWS), CONFIG)]
    first = store_fingerprint(CONFIG, source)
    shutil.copy(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    os.utime(path, (1, 1))
    second = store_fingerprint(CONFIG, source)
    assert first.value == second.value and first.files.keys() == second.files.keys() and first != second


def test_the_hash_of_a_large_file_is_kept_when_it_has_not_only_just_changed(tmp_path, monkeypatch):
    path, hashes = tmp_path / "rows.jsonl", tmp_path / "hashes"
    big(path, b"one")
    source = [open_source(str(path), CONFIG)]
    true = store_fingerprint(CONFIG, source, hashes).value
    assert not hashes.exists(), "it changed less than a minute ago"
    monkeypatch.setattr(fingerprint_module, "SETTLED_S", 0.0)
    assert store_fingerprint(CONFIG, source, hashes).value == true
    (entry,) = hashes.iterdir()
    for text, is_true in (("0" * 64, False), ("0" * 63, True), ("", True), ("\xff", True)):
        entry.write_bytes(text.encode("latin-1"))
        assert (store_fingerprint(CONFIG, source, hashes).value == true) == is_true, "only a whole entry is taken"
    entry.unlink()
    entry.mkdir()  # as on a read-only disk, none can be kept
    assert store_fingerprint(CONFIG, source, hashes).value == true
    same_times(path, os.stat(path))
    assert len(list(hashes.iterdir())) == 1 and store_fingerprint(CONFIG, source, hashes).value == true
    assert len(list(hashes.iterdir())) == 2, "the file system gave it another time of change"


class FromHub(Source):
    """ROWS in place of what a hub gives."""

    hub_commit: str | None = None

    def commit(self):
        return self.hub_commit

    def _all(self):
        return ((f"{self.path}:{i}", row) for i, row in enumerate(ROWS))


def test_a_store_of_hub_data_says_that_the_hub_was_not_asked(tmp_path, caplog):
    source = [FromHub("owner/name", CONFIG)]
    with caplog.at_level(logging.INFO, "megatron_sft"):
        folder = build_token_store(CONFIG, source, tmp_path / "cache", make_word_encoder).folder
        assert "hub" not in caplog.text
        assert build_token_store(CONFIG, source, tmp_path / "cache", make_word_encoder).folder == folder
    assert caplog.messages[-1] == "tokens: owner/name as the hub had it then; to ask it again, delete that folder."


def test_a_store_of_hub_data_is_that_of_the_commit(tmp_path, caplog):
    source = FromHub("owner/name", CONFIG)
    folders = []
    with caplog.at_level(logging.INFO, "megatron_sft"):
        for source.hub_commit in ("a1", "a1", "b2"):
            folders.append(build_token_store(CONFIG, [source], tmp_path / "cache", make_word_encoder).folder)
    assert folders[0] == folders[1] != folders[2]
    assert "as the hub had it" not in caplog.text


class Hub(BaseHTTPRequestHandler):
    """Says which commit a data set and a model have."""

    def do_GET(self):
        commits = {"/api/datasets/owner/rows": "d" * 40, "/api/models/owner/model": "e" * 40}
        found = commits.get(self.path.partition("?")[0])
        body = json.dumps({"id": self.path.partition("/owner/")[2], "sha": found}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_hub_says_which_commit_a_name_stands_for_or_its_cache_does(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert hub_commit("owner/rows", "dataset") == open_source("owner/rows:part@[:9]", CONFIG).commit() == "d" * 40
        assert hub_commit("owner/model", "model") == "e" * 40
        assert hub_commit("owner/gone", "model") is None
        server.shutdown()
    (tmp_path / "models--owner--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--owner--model" / "refs" / "main").write_text("f" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_commit("owner/model", "model") == "f" * 40
    assert hub_commit("owner/rows", "dataset") is None


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    source = [open_source(write(tmp_path / "rows.jsonl", ROWS), CONFIG)]
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError) as error:
        store_fingerprint(CONFIG, source)
    assert str(error.value) == (
        f"{tmp_path}/rows.jsonl: cannot be read (No such file or directory); expected a file. Correct its rights, or the path."
    )
