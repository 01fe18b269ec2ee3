import json

import numpy as np

from megatron_sft.data.packing import pack
from megatron_sft.data.report import as_html, as_json, as_table, data_report
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
    assert read["total"]["rows"] == 5 and sum(read["lengths"]["counts"]) == 3 and sum(read["fill"]["counts"]) == 2


def test_page_is_self_contained_and_escaped():
    page = as_html(report())
    assert page.count("<svg") == 4 and "<b>" not in page and "&lt;b&gt;" in page
    assert "http" not in page and "<script" not in page
