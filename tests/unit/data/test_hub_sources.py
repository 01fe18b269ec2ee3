"""Data sets by name from a hub on this machine, by datasets and huggingface_hub as they are."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.hub_server import Repository, serving

README = b"""---
configs:
- config_name: short
  data_files:
  - split: train
    path: short/train-*.parquet
- config_name: long
  data_files:
  - split: train
    path: long/train-*.parquet
  - split: test
    path: long/test-*.parquet
---
"""
CLIENT = """
import json, sys
from megatron_sft.config.run import DataConfig
from megatron_sft.data.sources import open_source
from megatron_sft.errors import DataError
answers = []
for path, config, split in json.loads(sys.argv[1]):
    try:
        answers.append(list(open_source(path, DataConfig(data_config=config, data_split=split))))
    except DataError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def parquet(*texts: str) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), content)
    return content.getvalue()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Any]:
    """{(path, config, split): rows with their places, or the error}; the last two without a network."""
    home = tmp_path_factory.mktemp("home")
    asked = [
        ("org/chats", "short", "train"),
        ("org/chats:long", "short", "train"),
        ("org/chats:long@[1:]", "", "train"),
        ("org/chats", "long", "test"),
        ("org/chats", "", "train"),
        ("org/chats:none", "", "train"),
        ("org/chats:long", "", "validation"),
        ("org/nothing", "", "train"),
    ]
    cached = [("org/chats:long", "offline", "test"), ("org/other", "offline", "train")]
    with serving() as hub:
        files = {"short/train-00000-of-00001.parquet": parquet("s1", "s2"), "README.md": README}
        files |= {
            "long/train-00000-of-00001.parquet": parquet("l1", "l2", "l3"),
            "long/test-00000-of-00001.parquet": parquet("t1"),
        }
        hub.datasets["org/chats"] = Repository(files)

        def answer(places: Any, **environment: str) -> list[Any]:
            command = [
                sys.executable,
                "-c",
                CLIENT,
                json.dumps([(path, config or None, split) for path, config, split in places]),
            ]
            done = subprocess.run(command, env=hub.environment(home, **environment), capture_output=True, text=True, check=True)
            return json.loads(done.stdout)  # type: ignore[no-any-return]

        found = dict(zip(asked, answer(asked), strict=True))
        return found | dict(zip(cached, answer([(p, "", s) for p, _, s in cached], HF_HUB_OFFLINE="1"), strict=True))


@pytest.mark.parametrize(
    ("asked", "texts", "place"),
    [
        (("org/chats", "short", "train"), ["s1", "s2"], "org/chats:1"),
        (("org/chats:long", "short", "train"), ["l1", "l2", "l3"], "org/chats:long:1"),
        (("org/chats:long@[1:]", "", "train"), ["l2", "l3"], "org/chats:long:2"),
        (("org/chats", "long", "test"), ["t1"], "org/chats:1"),
        (("org/chats:long", "offline", "test"), ["t1"], "org/chats:long:1"),
    ],
)
def test_a_configuration_is_named_by_flag_or_with_the_data_set(answers: Any, asked: Any, texts: list[str], place: str) -> None:
    assert [row["text"] for _, row in answers[asked]] == texts
    assert answers[asked][0][0] == place


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("org/chats", "", "train"), ["org/chats: neither", "Config name is missing", "['short', 'long']", "NAME:CONFIG"]),
        (("org/chats:none", "", "train"), ["'none' not found", "short", "--finetune-data-config"]),
        (("org/chats:long", "", "validation"), ['Unknown split "validation"', "--finetune-data-split"]),
        (("org/nothing", "", "train"), ["org/nothing", "doesn't exist on the Hub"]),
        (("org/other", "offline", "train"), ["org/other: neither", "hf download NAME --repo-type dataset --local-dir FOLDER"]),
    ],
)
def test_what_a_data_set_of_the_hub_lacks_is_said(answers: Any, asked: Any, words: list[str]) -> None:
    assert isinstance(answers[asked], str)
    assert [word for word in words if word not in answers[asked]] == []


def test_a_configuration_has_no_effect_on_local_files_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from megatron_sft.config.run import DataConfig
    from megatron_sft.data.sources import open_source

    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with caplog.at_level("INFO", logger="megatron_sft"):
        assert len(open_source(str(tmp_path / "rows.jsonl"), DataConfig(data_config="all"))) == 1
    assert "--finetune-data-config has no effect on" in caplog.text
