"""Every way in yields the same rows; every damaged file names itself, the line, the reason and the way out."""

import gzip
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from megatron_sft.config.run import DataConfig
from megatron_sft.data import sources
from megatron_sft.data.schema import RowError, to_row
from megatron_sft.data.sources import open_source
from megatron_sft.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
GOOD = json.dumps(CHAT).encode() + b"\n"


def _numbered(count: int) -> list[dict]:
    return [{"text": f"row {i}"} for i in range(count)]


def _write(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    elif path.name.endswith(".json.gz"):
        path.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
        path.write_bytes(json.dumps(rows).encode() if path.suffix == ".json" else pack(lines))
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst", ".json.gz"])
def test_every_format_yields_the_same_rows_in_order(tmp_path: Path, ending: str) -> None:
    source = open_source(str(_write(tmp_path / f"rows{ending}", _numbered(11))), DataConfig())
    assert source.name == "rows" and source.num_rows is None
    assert [record for _, record in source] == _numbered(11)
    assert [record for _, record in source] == _numbered(11)
    assert source.num_rows == len(source) == 11


CUTS = {"[2:5]": [2, 3, 4], "[:2]": [0, 1], "[8:]": [8, 9], "30%": [0, 1, 2], "100%": list(range(10))}


@pytest.mark.parametrize(("cut", "expected"), CUTS.items())
def test_slices(tmp_path: Path, cut: str, expected: list[int]) -> None:
    path = _write(tmp_path / "rows.jsonl", _numbered(10))
    items = list(open_source(f"{path}@{cut}", DataConfig()))
    assert [record for _, record in items] == [_numbered(10)[i] for i in expected]
    assert [where for where, _ in items] == [f"{path}:{i + 1}" for i in expected]


def test_folders_and_globs_read_all_files_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    _write(tmp_path / "b.jsonl", _numbered(2))
    _write(tmp_path / "deeper" / "c.parquet", _numbered(1))
    _write(tmp_path / "a.jsonl.gz", _numbered(1))
    (tmp_path / "README.md").write_text("no data")
    wheres = [os.path.relpath(where, tmp_path) for where, _ in open_source(str(tmp_path), DataConfig())]
    assert wheres == ["a.jsonl.gz:1", "b.jsonl:1", "b.jsonl:2", "deeper/c.parquet:1"]
    assert [w for w, _ in open_source(str(tmp_path / "*.jsonl"), DataConfig())] == [f"{tmp_path}/b.jsonl:{i}" for i in (1, 2)]


def test_json_lists_know_the_line_of_each_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + " " * 99 + '[\n {"text": "x\\n"},\n\n {"text":\n  "\u00e9"}\n]\n', encoding="utf-8")
    assert list(open_source(str(path), DataConfig())) == [(f"{path}:2", {"text": "x\n"}), (f"{path}:4", {"text": "\u00e9"})]


def test_arrow_nulls_are_left_out(tmp_path: Path) -> None:
    message = {"role": "user", "content": "a"}
    rows = [{"messages": [{**message, "name": None}]}, {"messages": [{**message, "name": "n"}]}]
    records = [record for _, record in open_source(str(_write(tmp_path / "r.parquet", rows)), DataConfig())]
    assert records == [{"messages": [{"role": "user", "content": "a"}]}, rows[1]]


def test_a_custom_class_gives_rows(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    lines = ["class Mine:", " def __init__(self, path): self.path = path"]
    file.write_text("\n".join([*lines, " def __iter__(self): return iter([{'text': self.path}, 3])"]))
    items = list(open_source("p", DataConfig(custom_dataset=f"{file}:Mine")))
    assert items[0] == ("p:1", {"text": "p"})
    assert isinstance(items[1][1], RowError)
    with pytest.raises(DataError, match="has no class Other"):
        open_source("p", DataConfig(custom_dataset=f"{file}:Other"))


CLASSES = {
    "def __init__(self, path): self.path = nothing": r"mine.py:2: NameError: name 'nothing'",
    "def __iter__(self):\n  yield {}\n  raise RuntimeError('x')": r"mine.py:4: RuntimeError: x",
    "def __iter__(self) return 3": r"mine.py:2: SyntaxError",
    "import nowhere": r"mine.py:2: ModuleNotFoundError",
    "pass": r"mine.py:1: TypeError: Mine\(\) takes no arguments",
}


@pytest.mark.parametrize("body", CLASSES)
def test_a_fault_in_a_custom_class_names_file_and_line(tmp_path: Path, body: str) -> None:
    text = f"class Mine:\n {body}\n"
    (tmp_path / "mine.py").write_text(
        text if "__init__" in body or body == "pass" else f"{text} def __init__(self, path): pass\n"
    )
    with pytest.raises(DataError, match=CLASSES[body]):
        list(open_source("p", DataConfig(custom_dataset=f"{tmp_path}/mine.py:Mine")))


def test_a_custom_class_may_hold_a_generator_and_reuse_its_dict(tmp_path: Path) -> None:
    lines = ["class Mine:", " def __init__(self, path): self.rows = self.made()", " def __iter__(self): return self.rows"]
    lines += [" def made(self):", "  row = {}", "  for i in (1, 2, {3}):", "   row['text'] = i", "   yield row"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    source = open_source("p", DataConfig(custom_dataset=f"{tmp_path}/mine.py:Mine"))
    for _ in range(2):
        (_, first), (_, second), (_, third) = source
        assert (first, second) == ({"text": 1}, {"text": 2}) and "a value that JSON has not" in str(third)


def _chat(content: object, role: object = "assistant", **more: object) -> bytes:
    message = {"role": role, "content": content, **more}
    return json.dumps({"messages": [{"role": "user", "content": "a"}, message]}).encode() + b"\n"


def _parquet(path: Path, arrays: list[pa.Array], names: list[str]) -> str:
    pyarrow.parquet.write_table(pa.table(arrays, names), path)
    return str(path)


def test_a_column_or_struct_field_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    texts = [pa.array(["a"]), pa.array(["b"])]
    flat = _parquet(tmp_path / "flat.parquet", texts, ["text", "text"])
    with pytest.raises(DataError, match=r"flat.parquet: column 'text' occurs twice; expected it once. Rename or remove"):
        list(open_source(flat, DataConfig()))
    table = pa.table([pa.array([[1]]), pa.StructArray.from_arrays(texts, ["role", "role"])], ["id", "message"])
    with pa.OSFile(str(tmp_path / "deep.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"deep.arrow: column 'role' occurs twice"):
        list(open_source(str(tmp_path / "deep.arrow"), DataConfig()))


def test_maps_are_objects_whose_keys_occur_once(tmp_path: Path) -> None:
    maps = pa.array([[("a", "1")], [("a", "1"), ("a", "2")], []], pa.map_(pa.string(), pa.string()))
    rows = list(open_source(_parquet(tmp_path / "maps.parquet", [maps], ["chat_template_kwargs"]), DataConfig()))
    assert [record for _, record in rows[::2]] == [{"chat_template_kwargs": {"a": "1"}}, {"chat_template_kwargs": []}]
    assert str(rows[1][1]) == (
        f"{tmp_path}/maps.parquet:2: a map of which key 'a' occurs twice in one object; expected each key once. Correct the row."
    )


@pytest.mark.parametrize("kind", ["plain", "dictionary"])
def test_a_row_of_any_format_is_held_to_16_mib(tmp_path: Path, kind: str) -> None:
    texts = pa.array(["a", "x" * (17 * 2**20), "b"] + ["y" * (12 * 2**20)] * 2)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts
    rows = list(open_source(_parquet(tmp_path / "rows.parquet", [texts], ["text"]), DataConfig()))
    assert [len(record["text"]) for _, record in rows if isinstance(record, dict)] == [1, 1, 12 * 2**20, 12 * 2**20]
    assert str(rows[1][1]) == (
        f"{tmp_path}/rows.parquet:2: the row is longer than 16 MiB; expected one conversation. Split or remove it."
    )
    (tmp_path / "mine.py").write_text("class Mine:\n def __new__(cls, path): return iter([{'text': 'x' * 17 * 2**20}])")
    ((_, record),) = open_source("p", DataConfig(custom_dataset=f"{tmp_path}/mine.py:Mine"))
    assert "p:1: the row is longer than 16 MiB" in str(record)


def test_a_list_is_read_by_windows_and_bad_rows_in_it_are_named(tmp_path: Path) -> None:
    texts = ["a", "\u00e9" * (9 * 2**20), "b"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    rows[1:1] = ['{"a": 1, "a": 2}', "3", '{"a": NaN}', '{"text": "' + "x" * (17 * 2**20) + '"}', '{"a":' * 65 + "1" + "}" * 65]
    (tmp_path / "rows.json").write_text("\ufeff[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
    items = list(open_source(str(tmp_path / "rows.json"), DataConfig()))
    assert [where.rpartition(":")[2] for where, _ in items] == [str(number) for number in range(2, 10)]
    assert [record["text"] for _, record in items if isinstance(record, dict)] == texts
    reasons = [record.reason for _, record in items if isinstance(record, RowError)]
    assert reasons == ["bad JSON", "not an object", "bad JSON", "row too long", "nested too deep"]


REPETITIVE = {
    "blank.jsonl.gz": gzip.compress(b"\n" * 2**26 + GOOD, 1),
    "blank.jsonl.zst": zstandard.ZstdCompressor().compress(b"\n \n" * 2**24 + GOOD),
    "equal.jsonl.zst": zstandard.ZstdCompressor().compress(GOOD * 2**17),
    "blank.json.gz": gzip.compress(b"[" + b"\n" * 2**26 + GOOD + b"]", 1),
    "short.json": b"[" + b"[],\n" * 2**16 + GOOD + b"]",
}


@pytest.mark.parametrize("name", REPETITIVE)
def test_what_compresses_well_is_read_in_time_that_grows_with_its_size(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(REPETITIVE[name])
    start, count, where = time.process_time(), 0, ""
    for where, record in open_source(str(tmp_path / name), DataConfig()):  # noqa: B007
        count += isinstance(record, dict)
    lines = {"blank.jsonl.gz": 2**26 + 1, "blank.jsonl.zst": 2**25 + 1, "equal.jsonl.zst": 2**17}
    assert where == f"{tmp_path / name}:{lines.get(name, 2**26 + 1 if name == 'blank.json.gz' else 2**16 + 1)}"
    assert count == (2**17 if name == "equal.jsonl.zst" else 1)
    assert time.process_time() - start < 20


PARQUET = b"PAR1" + bytes(40) + b"PAR1"
FRAME = zstandard.ZstdCompressor().compressobj()
UNFINISHED = FRAME.compress(GOOD) + FRAME.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
LINES = {
    "bad UTF-8": (b'{"text": "\xff"}\n', "not UTF-8"),
    "Latin-1": ('{"text": "\u00e9"}\n'.encode("latin-1"), "not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8"),
    "NUL in a string": (b'{"text": "\0"}\n', "not valid JSON"),
    "NUL between": (b"\0\0\0\n", "not valid JSON"),
    "truncated line": (GOOD[:40] + b"\n", "not valid JSON"),
    "two objects": (GOOD.strip() + GOOD, "not valid JSON"),
    "single quotes": (b"{'text': 'a'}\n", "not valid JSON"),
    "trailing comma": (b'{"text": "a",}\n', "not valid JSON"),
    "comment": (b"// a comment\n", "not valid JSON"),
    "NaN": (b'{"text": NaN}\n', "NaN is no JSON value"),
    "Infinity": (b'{"text": -Infinity}\n', "-Infinity is no JSON value"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
    "duplicate keys": (b'{"text": "a", "text": "b"}\n', "key 'text' occurs twice"),
    "duplicate keys in tools": (GOOD.strip()[:-1] + b', "tools": "[{\\"a\\": 1, \\"a\\": 2}]"}\n', "key 'a' occurs twice"),
    "duplicate keys in messages": (json.dumps({"messages": '[{"role": "user", "role": "user"}]'}).encode() + b"\n", "twice"),
    "duplicate keys in arguments": (
        _chat("b", tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}]),
        "JSON inside text: key 'x' occurs twice in one object; expected each key once, and finite numbers",
    ),
    "NaN in template arguments": (GOOD.strip()[:-1] + b', "chat_template_kwargs": "{\\"a\\": NaN}"}\n', "NaN is no JSON value"),
    "deep template arguments": (
        GOOD.strip()[:-1] + b', "chat_template_kwargs": "{\\"a\\":' + b"[" * 900 + b"]" * 900 + b'}"}\n',
        "nested too deep",
    ),
    "deep list": (b"[" * 100_000 + b"]" * 100_000 + b"\n", "nested too deep"),
    "a little deep": (b'{"a":' * 65 + b"1" + b"}" * 65 + b"\n", "nested too deep; expected at most 64 levels"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n", "nested too deep"),
    "a list": (b"[1]\n", "JSON list"),
    "a number": (b"3\n", "JSON int"),
    "a text": (b'"a"\n', "JSON str"),
    "null": (b"null\n", "JSON NoneType"),
    "empty object": (b"{}\n", "no known schema"),
    "unknown columns": (b'{"foo": "a", "bar": 1}\n', "no known schema"),
    "no messages": (b'{"messages": []}\n', "an empty list"),
    "messages is a number": (b'{"messages": 3}\n', "is a number"),
    "messages is an object": (b'{"messages": {"role": "user"}}\n', "is an object"),
    "messages is text": (b'{"messages": "hello"}\n', "is text"),
    "messages is null": (b'{"messages": null}\n', "no known schema"),
    "message is text": (b'{"messages": ["a"]}\n', "message 1 is text"),
    "message is null": (b'{"messages": [null]}\n', "message 1 is null"),
    "message is a list": (b'{"messages": [["user", "a"]]}\n', "message 1 is a list"),
    "wrong role": (_chat("b", "bot"), "role 'bot'"),
    "role in capitals": (_chat("b", "USER"), "role 'USER'"),
    "role is null": (_chat("b", None), "no role"),
    "role is a number": (_chat("b", 1), "role 1"),
    "role is a list": (_chat("b", ["assistant"]), "role ['assistant']"),
    "no role": (b'{"messages": [{"content": "a"}]}\n', "no role"),
    "no content": (b'{"messages": [{"role": "assistant"}]}\n', "content that is null"),
    "content is null": (_chat(None), "content that is null"),
    "content is a number": (_chat(1.5), "content that is a number"),
    "content is a boolean": (_chat(True), "content that is a boolean"),
    "content is an object": (_chat({"a": 1}), "content that is an object"),
    "content is a list": (_chat([1, 2]), "content that is a list"),
    "content is an empty list": (_chat([]), "content that is a list"),
    "content has an image": (_chat([{"type": "image_url", "image_url": "u"}]), "content that is a list"),
    "lone surrogate": (_chat("\ud800"), "lone surrogate at character 0"),
    "lone surrogate in a prompt": (b'{"prompt": "a\\udfff", "response": "b"}\n', "lone surrogate at character 1"),
    "lone surrogate in reasoning": (_chat("b", reasoning_content="\ud83d"), "lone surrogate"),
    "only system": (b'{"messages": [{"role": "system", "content": "a"}]}\n', "no assistant message"),
    "no assistant": (_chat("b", "user"), "no assistant message"),
    "train is text": (_chat("b", train="yes"), "train 'yes'"),
    "weight is negative": (_chat("b", weight=-1), "weight -1"),
    "weight is tiny": (_chat("b", weight=1e-50), "weight 1e-50; expected 0 or a number from 1e-6"),
    "weight is text": (_chat("b", weight="1"), "weight '1'"),
    "tool call without name": (_chat("b", tool_calls=[{"function": {}}]), "without a function name"),
    "tool calls a number": (_chat("b", tool_calls=3), "without a function name"),
    "tools a number": (b'{"messages": [{"role": "assistant", "content": "b"}], "tools": 3}\n', "holds 3"),
    "tools null": (b'{"messages": [{"role": "assistant", "content": "b"}], "tools": [null]}\n', "holds None"),
    "system a number": (b'{"messages": [{"role": "assistant", "content": "b"}], "system": 3}\n', "column system"),
    "template arguments of HF": (GOOD.strip()[:-1] + b', "chat_template_kwargs": {"max_length": 1}}\n', "sets max_length"),
    "template arguments a list": (GOOD.strip()[:-1] + b', "chat_template_kwargs": [1]}\n', "is a list"),
    "Alpaca without output text": (b'{"instruction": "a", "output": null}\n', "column output"),
    "Alpaca with bad history": (b'{"instruction": "a", "output": "b", "history": [3]}\n', "column history"),
    "pair with a number": (b'{"prompt": "a", "response": 3}\n', "column response"),
    "text is null": (b'{"text": null}\n', "column text"),
    "ShareGPT without value": (b'{"conversations": [{"from": "gpt"}]}\n', "content that is null"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_named_and_the_rows_around_it_are_kept(tmp_path: Path, name: str) -> None:
    line, reason = LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + (b"" if name == "UTF-16" else b"\n" + GOOD))
    kept, refused = [], []
    for where, record in open_source(str(path), DataConfig()):
        try:
            kept.append(to_row(record, where, DataConfig()).where)
        except RowError as error:
            refused.append(str(error))
    assert kept == [f"{path}:1"] + ([] if name == "UTF-16" else [f"{path}:4"])
    assert refused[0].startswith(f"{path}:2: ") and reason in refused[0] and refused[0].endswith(".")
    assert len(refused) == (2 if name == "UTF-16" else 1)


FILES = {
    "empty.jsonl": (b"", "the file is empty"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 900)[:60], "cannot be read to its end"),
    "no.jsonl.gz": (GOOD, "cannot be read to its end"),
    "crc.jsonl.gz": (gzip.compress(GOOD)[:-8] + bytes(8), "cannot be read to its end"),
    "no.jsonl.zst": (GOOD, "cannot be read to its end"),
    "frame.jsonl.zst": (
        zstandard.ZstdCompressor().compress(GOOD) + UNFINISHED,
        "cannot be read to its end (Truncated compressed stream)",
    ),
    "blank.jsonl": (b"\n \n", "no row is there"),
    "list.json": (b"[]", "no row is there"),
    "magic.parquet": (b"PAR0junk", "not a Parquet file"),
    "footer.parquet": (PARQUET, "not a Parquet file"),
    "no.arrow": (b"ARROW1 junk junk", "not an Arrow file"),
    "open.json": (b"[" + GOOD, "the JSON list is not closed"),
    "comma.json": (b"[" + GOOD + GOOD + b"]", "the JSON list is not closed"),
    "deep.json": (b"[" * 100_000, "nested too deep"),
    "two.json": (b"[" + GOOD + b"]\n[" + GOOD + b"]", "follows the JSON list"),
    "pretty.json": (json.dumps(CHAT, indent=1).encode(), "an object over several lines"),
    "\x1b[31m.jsonl": (GOOD, "control characters in the name"),
    "bytes.json": (b'[{"text": "\xff\xff\xff\xff\xff"}]', "not UTF-8"),
    "half.json": (b'[{"text": "a', "not valid JSON"),
    "rows.csv": (b"a,b\n", "unknown ending"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    content, reason = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(open_source(str(tmp_path / name), DataConfig()))
    assert str(error.value).lstrip("'").startswith(str(tmp_path / name).partition("\x1b")[0]) and reason in str(error.value)


def test_paths_that_hold_nothing_are_errors(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling.jsonl").symlink_to("gone")
    (tmp_path / "empty").mkdir()
    closed = "cannot be opened"
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "endless.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "gone.jsonl").symlink_to("gone")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    _write(tmp_path / "rows.jsonl", _numbered(1))
    wrong = {"loop": closed, "dangling.jsonl": closed, "empty": "no data file", "none.jsonl": "no such file"}
    wrong |= {"pipe.jsonl": "a pipe", "endless.jsonl": "a pipe", "folder": "gone.jsonl: cannot", "splits": "splits/train"}
    wrong |= {"rows.jsonl@101%": "above 100 %", "rows.jsonl@[-1:]": "no such file", f"rows.jsonl@[:{10**20}]": "no such file"}
    for name, reason in wrong.items():
        with pytest.raises(DataError, match=reason):
            open_source(str(tmp_path / name), DataConfig())


def test_linked_folders_are_read_once_and_hidden_ones_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "top" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("top/a.jsonl", "top/.ipynb_checkpoints/a.jsonl", "elsewhere/b.jsonl"):
        _write(tmp_path / name, _numbered(1))
    (tmp_path / "top" / "again").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "linked").symlink_to(tmp_path / "elsewhere")
    files = open_source(str(tmp_path / "top"), DataConfig()).files
    assert files == [str(tmp_path / "top" / "a.jsonl"), str(tmp_path / "top" / "linked" / "b.jsonl")]


@pytest.mark.parametrize("slice_", ["[5:2]", "[9:]", "[0:0]", "0%", "1%"])
def test_a_slice_without_rows_is_an_error(tmp_path: Path, slice_: str) -> None:
    path = _write(tmp_path / "rows.jsonl", _numbered(3))
    with pytest.raises(DataError, match="no row is there"):
        list(open_source(f"{path}@{slice_}", DataConfig()))


HARMLESS = [b"\xef\xbb\xbf" + GOOD + GOOD, (GOOD + GOOD).replace(b"\n", b"\r\n"), GOOD + b"\n \n" + GOOD.strip()]


@pytest.mark.parametrize("content", HARMLESS)
def test_byte_order_mark_line_ends_and_blank_lines_are_fine(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert [record for _, record in open_source(str(tmp_path / "a.jsonl"), DataConfig())] == [CHAT, CHAT]


def test_a_line_beyond_the_limit_is_skipped_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "' + b"x" * (33 * 2**20) + b'"}\n' + GOOD)
    items = list(open_source(str(tmp_path / "a.jsonl"), DataConfig()))
    assert [type(record) for _, record in items] == [dict, RowError, dict]
    assert "a.jsonl:2: the row is longer than 16 MiB" in str(items[1][1])
    assert items[2][0].endswith("a.jsonl:3")


def test_a_dictionary_of_parquet_does_not_become_all_its_rows_at_once(tmp_path, monkeypatch):
    """300 rows of 4 MB in a file of kilobytes: as if by batches they would take 1.2 GB."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["x" * 4_000_000]))
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": texts})
    pyarrow.parquet.write_table(table, path, dictionary_pagesize_limit=2**26, store_schema=False, compression="zstd")
    monkeypatch.setattr(sources, "BATCH_MEMORY_BYTES", 2**28)
    before, lengths, most = pa.total_allocated_bytes(), [], 0
    for _, row in open_source(str(path), DataConfig()):
        lengths.append(len(row["text"]))
        most = max(most, pa.total_allocated_bytes() - before)
    assert lengths == [4_000_000] * 300
    assert most < 2**26
    table = pa.table({"text": pa.ListArray.from_arrays([0, 300], texts)})
    pyarrow.parquet.write_table(table, path, dictionary_pagesize_limit=2**26, store_schema=False, compression="zstd")
    with pytest.raises(DataError, match=r"rows.parquet:1: the row needs more than 0 GiB of memory; expected one conversation."):
        list(open_source(str(path), DataConfig()))
