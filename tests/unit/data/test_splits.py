"""A folder of several splits is read as `datasets` reads it, and what is left is said."""

import logging
import os
from pathlib import Path

import pytest
from datasets import load_dataset_builder

from megatron_sft.config.run import DataConfig
from megatron_sft.data.prepare import VALID_SPLITS
from megatron_sft.data.sources import open_source
from megatron_sft.errors import DataError

ROW = '{"text": "a"}\n'


def lay(folder: Path, files: list[str], card: str = "") -> str:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# A data set\n")
    return str(folder)


def taken(folder: str, split: str, splits: tuple[str, ...] = ()) -> list[str]:
    return [os.path.relpath(file, folder) for file in open_source(folder, DataConfig(data_split=split), splits=splits).files]


LAYOUTS = [
    ["train.jsonl", "test.jsonl", "validation.jsonl"],
    ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"],
    ["train_0.jsonl", "train_1.jsonl", "test_0.jsonl", "my-dev 2.jsonl", "other.jsonl"],
    ["a.jsonl", "b.jsonl", "deep/c.jsonl"],
    ["trainer.jsonl", "pretrain.jsonl", "tests.jsonl", "devel.jsonl"],
    ["data/train/a.jsonl", "data/train/b.jsonl", "data/test/a.jsonl", "data/eval/a.jsonl"],
    ["train/a.jsonl", "train/test.jsonl", "top.jsonl"],
    ["my-train_2/a.jsonl", "val/b.jsonl", "train.jsonl"],
    ["training/x.jsonl", "testing/x.jsonl", "evaluation/y.jsonl"],
    ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl", "train.jsonl"],
    ["data/train-00000-of-00001-abcdef.jsonl", "data/validation-00000-of-00001.jsonl"],
    ["sub/data/train-00000-of-00001.jsonl", "sub/data/test-00000-of-00001.jsonl"],
    ["rows_train.jsonl", "rows.test.jsonl", "rows val.jsonl", "TRAIN.jsonl"],
    ["train_test.jsonl", "test_val-1.jsonl"],
    ["test.jsonl", "rest.jsonl"],
]
HEAD = "configs:\n- config_name: x\n  data_files:"
CARDS = {
    "files": f"{HEAD}\n  - split: train\n    path: a.jsonl\n  - split: test\n    path: b.jsonl",
    "globs": f"{HEAD}\n  - split: train\n    path: ['deep/*', 'a.*']\n  - split: held\n    path: b*",
    "one": f"{HEAD} '**/c.jsonl'",
    "list": f"{HEAD} [a.jsonl, deep/c.jsonl]",
    "marked": "configs:\n- {config_name: x, data_files: a.jsonl}\n- {config_name: y, data_files: b.jsonl, default: true}",
    "called": "configs:\n- {config_name: x, data_files: a.jsonl}\n- {config_name: default, data_files: b.jsonl}",
    "folder": "configs:\n- {config_name: x, data_dir: deep}",
    "nothing": "license: mit",
}


def of_datasets(folder: str, tmp_path: Path) -> dict[str, list[str]]:
    found = load_dataset_builder(folder, cache_dir=str(tmp_path / "hf")).config.data_files
    return {
        str(split): sorted(os.path.relpath(file, os.path.realpath(folder)) for file in files) for split, files in found.items()
    }


def same_as_datasets(folder: str, tmp_path: Path) -> None:
    expected = of_datasets(folder, tmp_path)
    assert expected
    for split, files in expected.items():
        assert taken(folder, split) == files
    if "train" not in expected:
        with pytest.raises(DataError, match=f"{folder}: has the splits {', '.join(expected)}; expected train. Name the files"):
            taken(folder, "train")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_split_names_are_those_of_datasets(tmp_path: Path, layout: list[str]) -> None:
    same_as_datasets(lay(tmp_path / "rows", layout), tmp_path)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_followed_as_datasets_does(tmp_path: Path, name: str) -> None:
    files = ["a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/train.jsonl", "deep/test.jsonl"]
    files = files[:4] if name in ("nothing", "globs") else files
    same_as_datasets(lay(tmp_path / "rows", files, CARDS[name]), tmp_path)


BAD_CARDS = {
    "configs:\n- {config_name: x, data_files: a.jsonl}\n- {config_name: y, data_files: b.jsonl}": (
        "README.md: has the configurations x, y, and 0 of them are the default; expected one. Name the files"
    ),
    "configs:\n- {config_name: x, data_files: ../secret.jsonl}": (
        "README.md: its data_files ../secret.jsonl are no data files below {folder}; expected some. Correct it."
    ),
    "configs: [": "README.md: its head cannot be read (while parsing a flow node",
}


@pytest.mark.parametrize("card", BAD_CARDS)
def test_a_card_that_cannot_be_followed_is_an_error(tmp_path: Path, card: str) -> None:
    (tmp_path / "secret.jsonl").write_text(ROW)
    folder = lay(tmp_path / "rows", ["a.jsonl", "b.jsonl"], card)
    with pytest.raises(DataError) as error:
        taken(folder, "train")
    assert str(error.value).startswith(f"{folder}/{BAD_CARDS[card]}".replace("{folder}", folder))


def test_what_is_read_and_what_is_left_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = lay(tmp_path, [*(f"train-{i}.jsonl" for i in range(6)), "test.jsonl", "dev.jsonl", "dev-2.jsonl", "more.jsonl"])
    with caplog.at_level(logging.INFO, "megatron_sft"):
        assert len(taken(folder, "train")) == 6
    assert caplog.messages == [
        f"{folder}: 6 of 10 files are split train (train-0.jsonl, train-1.jsonl, train-2.jsonl, train-3.jsonl, ...); left: "
        "validation (2), test (1), of no split (1)"
    ]


def test_files_globs_and_folders_without_splits_are_taken_as_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = lay(tmp_path, ["test.jsonl", "train.jsonl"])
    with caplog.at_level(logging.INFO, "megatron_sft"):
        assert open_source(f"{folder}/test.jsonl", DataConfig()).files == [f"{folder}/test.jsonl"]
        assert len(open_source(f"{folder}/*.jsonl", DataConfig()).files) == 2
        assert taken(lay(tmp_path / "plain", ["a.jsonl", "b.jsonl"]), "test") == ["a.jsonl", "b.jsonl"]
    assert not caplog.messages


def test_validation_data_take_the_validation_split_and_else_the_test_split(tmp_path: Path) -> None:
    folder = lay(tmp_path / "all", ["train.jsonl", "test.jsonl", "validation.jsonl"])
    assert taken(folder, "train", VALID_SPLITS) == ["validation.jsonl"]
    assert taken(lay(tmp_path / "two", ["train.jsonl", "test.jsonl"]), "train", VALID_SPLITS) == ["test.jsonl"]
    with pytest.raises(DataError, match="has the splits train; expected validation or test"):
        taken(lay(tmp_path / "one", ["train.jsonl"]), "train", VALID_SPLITS)
    saved = lay(tmp_path / "saved", ["dataset_dict.json", "train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"])
    assert taken(saved, "train", VALID_SPLITS) == ["test/data-00000-of-00001.arrow"]
