"""Which rows are trained on, validated on and left for test: by row, each in exactly one part."""

import dataclasses
import logging

import numpy as np
import pytest

from megatron_sft.config.run import DataConfig
from megatron_sft.data.prepare import open_store, pack_documents, split_documents
from megatron_sft.data.store import MemoryStore
from megatron_sft.errors import DataError


def store_of(row_ids):
    return MemoryStore([(np.arange(2), np.ones(2, np.uint8))] * len(row_ids), row_ids=row_ids)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ((80, 10, 10), (16, 2, 2)),
        ((50, 0, 50), (10, 0, 10)),
        ((100, 0, 0), (20, 0, 0)),
        ((0.8, 0.2, 0.0), (16, 4, 0)),
        ((1, 1, 1), (7, 7, 6)),
        ((3, 1, 0), (15, 5, 0)),
        ((1e308, 1e308, 0), (10, 10, 0)),
        ((1e-300, 0, 1e-300), (10, 0, 10)),
        ((2, 49, 49), (0, 10, 10)),
    ],
)
def test_shares_of_any_numbers_hold_out_their_rows(split, expected):
    parts = split_documents(DataConfig(split=split), store_of(range(20)))
    assert tuple(len(part) for part in parts) == expected
    assert sorted(np.concatenate(parts).tolist()) == list(range(20))


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_exactly_one_part_with_all_its_documents(seed):
    random = np.random.default_rng(seed)
    row_ids = np.sort(random.integers(0, 1000, size=int(random.integers(1, 300))))
    store = store_of(row_ids)
    parts = split_documents(DataConfig(split=tuple(random.uniform(0.1, 9, 3)), seed=seed), store)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(store)))
    rows = [set(row_ids[part].tolist()) for part in parts]
    assert sum(map(len, rows)) == len(set(row_ids.tolist())), "a row stands in two parts"


def test_valid_data_leaves_the_training_rows_as_they_are(caplog):
    config = DataConfig(split=(80, 10, 10))
    with caplog.at_level(logging.INFO, "megatron_sft"):
        alone = split_documents(config, store_of(range(20)))
        beside = split_documents(dataclasses.replace(config, valid_data=("v.jsonl",)), store_of(range(20)))
    assert [part.tolist() for part in alone] == [part.tolist() for part in beside]
    assert caplog.messages == [
        "--split 80,10,10: 16 rows to train on, 2 held out for validation, 2 held out for test (not read here).",
        "--split 80,10,10: 16 rows to train on, 2 held out for validation and not read, because --valid-data is, "
        "2 held out for test (not read here).",
    ]


def test_a_share_of_less_than_half_a_row_is_said(caplog):
    with caplog.at_level(logging.WARNING, "megatron_sft"):
        parts = split_documents(DataConfig(split=(98, 2, 0)), store_of(range(20)))
    assert len(parts.train) == 20
    assert caplog.messages == ["--split 98,2,0: the validation share of 20 rows is less than half a row: none."]


def test_nothing_to_train_on_is_an_error_that_names_the_flags():
    with pytest.raises(DataError) as error:
        pack_documents(DataConfig(split=(2, 49, 49)), store_of(range(20)), np.zeros(0, np.int64))
    assert str(error.value) == (
        "no row is left of 20 documents by --split (2, 49, 49), --prompt-data-epochs () and --prompt-data-weights (); "
        "expected at least one. Give training a larger share."
    )


def test_a_user_without_a_home_is_told_what_to_pass(monkeypatch):
    """As in a container that runs as an unknown user."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4321)
    with pytest.raises(DataError, match=r"user 4321 has no home folder .* Pass --data-cache-path FOLDER"):
        open_store(DataConfig(tokenizer_model="any"), [])
