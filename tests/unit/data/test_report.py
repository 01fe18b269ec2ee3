import json

import numpy as np
import pytest

from megatron_sft.data.packing import pack
from megatron_sft.data.report import _histogram, as_html, as_json, as_table, data_report
from megatron_sft.data.store import MemoryStore

LEDGER = {
    "chat": {
        "rows": 4,
        "kept": 1,
        "truncated": 1,
        "split": 0,
        "dropped": {"no trained token": 2},
        "schemas": {"messages": 4},
        "documents": 2,
        "tokens": 10,
        "trained_tokens": 4,
        "lost_tokens": 3,
    },
    "<b>": {
        "rows": 1,
        "kept": 1,
        "truncated": 0,
        "split": 0,
        "dropped": {},
        "schemas": {"text": 1},
        "documents": 1,
        "tokens": 6,
        "trained_tokens": 6,
        "lost_tokens": 0,
    },
}


def report():
    documents = [(np.arange(n), np.ones(n, np.uint8)) for n in (7, 3, 6)]
    store = MemoryStore(documents, source_ids=[0, 0, 1], source_names=("chat", "<b>"), ledger=LEDGER)
    return data_report(store, pack(store.lengths, 10, "best-fit"), 10)


def test_table():
    assert as_table(report()).splitlines() == [
        "source  rows  kept  truncated  split  dropped  documents  tokens  trained %  mean length",
        "chat       4     1          1      0        2          2      10       40.0            5",
        "<b>        1     1          0      0        0          1       6      100.0            6",
        "total      5     2          1      0        2          3      16       62.5            5",
        "dropped: 2 rows, no trained token",
        "schemas: 4 messages, 1 text",
        "cut away or dropped after tokenising: 3 tokens",
        "mixture, one epoch by tokens: chat 62.5% (2 documents), <b> 37.5% (1 documents)",
        "packs: 2 of 10 tokens, 80.00% full, 1.5 documents a pack",
    ]


def test_json_has_the_mixture_and_histograms():
    read = json.loads(as_json(report()))
    assert read["mixture"] == {
        "chat": {"documents": 2, "tokens": 10, "share": 0.625},
        "<b>": {"documents": 1, "tokens": 6, "share": 0.375},
    }
    assert read["total"]["rows"] == 5 and read["lengths"] == {"edges": [3, 4, 6, 7, 8], "counts": [1, 0, 1, 1]}
    assert read["fill"]["tokens"][0] == 6 and read["fill"]["tokens"][-1] == 10 and len(read["fill"]["share"]) == 41


def test_page_is_self_contained_and_escaped():
    page = as_html(report())
    assert page.count("<svg") == 2 and "<b>" not in page and "&lt;b&gt;" in page
    assert page.count("chat</td>") == 1 and "no trained token" in page, "the table stands once"
    assert "http" not in page and "<script" not in page


@pytest.mark.parametrize("kind", ["one length", "even", "long tail", "outlier", "two groups", "few"])
def test_bins_of_lengths_are_not_mostly_empty(kind):
    random = np.random.default_rng(0)
    lengths = {
        "one length": np.full(50, 7),
        "even": random.integers(1, 4096, 5000),
        "long tail": np.minimum(4096, np.exp(random.normal(5, 1, 5000)).astype(int) + 1),
        "outlier": np.append(random.integers(100, 200, 500), 4096),
        "two groups": np.append(random.integers(40, 60, 500), random.integers(3900, 4096, 500)),
        "few": np.array([3, 900]),
    }[kind]
    found = _histogram(lengths)
    edges, counts = found["edges"], np.array(found["counts"])
    assert counts.sum() == len(lengths) and len(edges) == len(counts) + 1 and edges == sorted(set(edges))
    assert len(counts) <= 24 and ((counts == 0).mean() <= 1 / 3 or len(counts) <= 2)
    assert len(counts) > 5 or kind in ("one length", "outlier", "two groups", "few")
