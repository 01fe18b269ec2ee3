"""What happened to the data: the ledger and the packs as a dict (JSON), a table for the console, a page with plots.

Not here: counting (tokens.py). Printed at the start of training and by `megatron-sft report`.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_sft.data.chat import NOTES
from megatron_sft.data.packing import PackPlan, packing_figures, token_counts
from megatron_sft.data.store import DocumentStore
from megatron_sft.pages.figures import curve, figures, histogram
from megatron_sft.pages.markup import Markup, join, page, table, tag

COLUMNS = ("source", "rows", "kept", "truncated", "split", "dropped", "documents", "tokens", "trained %", "mean length")
NUM_BINS = 24
QUANTILES = 40


def data_report(store: DocumentStore, plan: PackPlan, seq_length: int) -> dict[str, Any]:
    """Everything that the table and the page show, JSON-able.

    Args:
        store: its ledger has rows, kept, truncated, split, dropped, documents, tokens, trained_tokens a source.
        plan: the packs of those documents.
        seq_length: tokens per pack.

    Returns:
        sources (the ledger), total (its sum), packing (packing.packing_figures), lengths (a histogram of documents by tokens),
        fill (tokens of the packs at each of QUANTILES + 1 shares of them, from the emptiest on).
    """
    sources = {name: dict(entry) for name, entry in store.ledger.items()}
    total: dict[str, Any] = {"dropped": {}, "schemas": {}, "routes": {}, "notes": {}}
    for entry in sources.values():
        for key, value in entry.items():
            if isinstance(value, dict):
                for reason, count in value.items():
                    total[key][reason] = total[key].get(reason, 0) + count
            else:
                total[key] = total.get(key, 0) + value
    return {
        "fingerprint": store.fingerprint,
        "seq_length": seq_length,
        "sources": sources,
        "total": total,
        "packing": dict(packing_figures(plan, store.lengths, seq_length)),
        "mixture": _mixture(store, plan),
        "lengths": _histogram(store.lengths),
        "fill": _quantiles(token_counts(plan, store.lengths)),
    }


def as_table(report: Mapping[str, Any]) -> str:
    """A plain-text table, one line per source, then why rows were dropped, then the packs."""
    rows = [_table_row(name, entry) for name, entry in report["sources"].items()]
    if len(rows) > 1:
        rows.append(_table_row("total", report["total"]))
    lines = [COLUMNS, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    out = []
    for name, *numbers in lines:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        out.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join([*out, *_notes(report)])


def as_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1)


def as_html(report: Mapping[str, Any]) -> str:
    """One self-contained page: no scripts, no requests."""
    return page("Data", [("Rows", rows_part(report)), ("Lengths and packs", packs_part(report))])


def rows_part(report: Mapping[str, Any]) -> Markup:
    """The table and what is to say of it, for a page."""
    rows = [_table_row(name, entry) for name, entry in report["sources"].items()]
    if len(rows) > 1:
        rows.append(_table_row("total", report["total"]))
    notes = (tag("li", line) for line in _notes(report))
    return join([table(COLUMNS, rows), tag("ul", join(notes), 'class="said"')])


def packs_part(report: Mapping[str, Any]) -> Markup:
    """Plots of the documents' lengths and of the packs' fill, for a page."""
    lengths, fill = report["lengths"], report["fill"]
    full = [100 * tokens / report["seq_length"] for tokens in fill["tokens"]]
    shares = [100 * share for share in fill["share"]]
    return figures(
        [
            histogram("Documents by length", "tokens", lengths["edges"], lengths["counts"]),
            curve(
                "How full packs are", "% of the packs, from the emptiest", f"% of {report['seq_length']:,} tokens", shares, full
            ),
        ]
    )


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What a table of sources leaves out."""
    out = []
    for reason, count in sorted(report["total"]["dropped"].items()):
        out.append(f"dropped: {count:,} rows, {reason}")
    out.append("schemas: " + ", ".join(f"{count:,} {schema}" for schema, count in report["total"]["schemas"].items()))
    if report["total"]["routes"]:
        out.append("masks: " + ", ".join(f"{count:,} by {route}" for route, count in report["total"]["routes"].items()))
    for note, count in sorted(report["total"]["notes"].items()):
        out.append(f"{note}: {count:,} rows; {NOTES[note]}.")
    if report["total"].get("lost_tokens"):
        out.append(f"cut away or dropped after tokenising: {report['total']['lost_tokens']:,} tokens")
    if len(report["sources"]) > 1:
        shares = (f"{name} {entry['share']:.1%} ({entry['documents']:,} documents)" for name, entry in report["mixture"].items())
        out.append(f"mixture, one epoch by tokens: {', '.join(shares)}")
    packing = report["packing"]
    out.append(
        f"packs: {packing['packs']:,} of {report['seq_length']:,} tokens, {packing['efficiency']:.2%} full, "
        f"{packing['documents_per_pack']:.1f} documents a pack"
    )
    return out


def _table_row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = [entry["rows"], entry["kept"], entry["truncated"], entry["split"], sum(entry["dropped"].values())]
    documents, tokens = entry["documents"], entry["tokens"]
    share = f"{100 * entry['trained_tokens'] / max(tokens, 1):.1f}"
    return (name, *(f"{n:,}" for n in (*numbers, documents, tokens)), share, f"{tokens / max(documents, 1):,.0f}")


def _mixture(store: DocumentStore, plan: PackPlan) -> dict[str, dict[str, float]]:
    """Documents and tokens of each source as they stand in the packs: the mixture that is really trained on."""
    sources = store.source_ids[plan.doc_ids]
    documents = np.bincount(sources, minlength=len(store.source_names))
    tokens = np.bincount(sources, weights=store.lengths[plan.doc_ids], minlength=len(store.source_names))
    every = max(tokens.sum(), 1.0)
    return {
        name: {"documents": int(documents[i]), "tokens": int(tokens[i]), "share": float(tokens[i] / every)}
        for i, name in enumerate(store.source_names)
    }


def _histogram(values: np.ndarray) -> dict[str, list[Any]]:
    """Of whole numbers above 0: at most NUM_BINS bins from the least to the greatest, fewer where a third would be empty.

    Bins have one width, or grow by one factor where fewer are empty then: [7, 3, 6] -> edges [3, 4, 6, 7, 8], counts
    [1, 0, 1, 1].
    """
    if not len(values):
        return {"edges": [1, 2], "counts": [0]}
    low, high = int(values.min()), int(values.max()) + 1
    best, number = np.zeros(1, int), min(NUM_BINS, 1 + int(np.sqrt(len(values)) * 2))
    while True:
        for space in (np.linspace, np.geomspace):
            edges = np.unique(np.rint(space(low, high, number + 1)).astype(int))
            counts = np.histogram(values, bins=edges)[0]
            if space is np.linspace or np.mean(counts == 0) < np.mean(best == 0):
                best, chosen = counts, edges
        if number <= 2 or np.mean(best == 0) <= 1 / 3:
            return {"edges": chosen.tolist(), "counts": best.tolist()}
        number //= 2


def _quantiles(values: np.ndarray) -> dict[str, list[float]]:
    shares = np.linspace(0, 1, QUANTILES + 1)
    tokens = np.quantile(values, shares, method="nearest") if len(values) else np.zeros(QUANTILES + 1)
    return {"share": [round(float(share), 4) for share in shares], "tokens": [int(count) for count in tokens]}
