"""What happened to the data: the ledger and the packs as a dict (JSON), a table for the console, a page with plots.

Not here: counting (tokens.py). Printed at the start of training and by `megatron-sft report`.
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_sft.data.chat import NOTES
from megatron_sft.data.packing import PackPlan, packing_figures, token_counts
from megatron_sft.data.store import DocumentStore

COLUMNS = ("source", "rows", "kept", "truncated", "split", "dropped", "documents", "tokens", "trained %", "mean length")
NUM_BINS = 24


def data_report(store: DocumentStore, plan: PackPlan, seq_length: int) -> dict[str, Any]:
    """Everything that the table and the page show, JSON-able.

    Args:
        store: its ledger has rows, kept, truncated, split, dropped, documents, tokens, trained_tokens a source.
        plan: the packs of those documents.
        seq_length: tokens per pack.

    Returns:
        sources (the ledger), total (its sum), packing (packing.packing_figures), lengths and fill (histograms).
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
        "lengths": _histogram(store.lengths, seq_length),
        "fill": _histogram(token_counts(plan, store.lengths), seq_length),
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
    for reason, count in sorted(report["total"]["dropped"].items()):
        out.append(f"dropped: {count:,} rows, {reason}")
    out.append("schemas: " + ", ".join(f"{count:,} {schema}" for schema, count in report["total"]["schemas"].items()))
    if report["total"]["routes"]:
        out.append("masks: " + ", ".join(f"{count:,} by {route}" for route, count in report["total"]["routes"].items()))
    for note, count in sorted(report["total"]["notes"].items()):
        out.append(f"{note}: {count:,} rows; {NOTES[note]}.")
    if report["total"].get("lost_tokens"):
        out.append(f"cut away or dropped after tokenising: {report['total']['lost_tokens']:,} tokens")
    if len(rows) > 1:
        shares = (f"{name} {entry['share']:.1%} ({entry['documents']:,} documents)" for name, entry in report["mixture"].items())
        out.append(f"mixture, one epoch by tokens: {', '.join(shares)}")
    packing = report["packing"]
    out.append(
        f"packs: {packing['packs']:,} of {report['seq_length']:,} tokens, {packing['efficiency']:.2%} full, "
        f"{packing['documents_per_pack']:.1f} documents a pack"
    )
    return "\n".join(out)


def as_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1)


def as_html(report: Mapping[str, Any]) -> str:
    """One self-contained page: no scripts, no requests."""
    body = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in COLUMNS)}</tr>"]
    for name, entry in [*report["sources"].items(), ("total", report["total"])]:
        body.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _table_row(name, entry))}</tr>")
    dropped = report["total"]["dropped"]
    bars = {name: entry["tokens"] for name, entry in report["mixture"].items()}
    parts = [
        "<!doctype html><meta charset='utf-8'><title>megatron-sft data report</title>",
        "<style>body{font:14px sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .8em;text-align:right}"
        "td:first-child,th:first-child{text-align:left}rect{fill:#4878a8}text{font-size:11px}</style>",
        "<h1>Data</h1>",
        f"<table>{''.join(body)}</table>",
        f"<pre>{html.escape(as_table(report))}</pre>",
        _plot("Documents by length (tokens)", report["lengths"]["labels"], report["lengths"]["counts"]),
        _plot("Packs by tokens in them", report["fill"]["labels"], report["fill"]["counts"]),
        _plot("Tokens in packs by source", list(bars), list(bars.values())),
    ]
    if dropped:
        parts.append(_plot("Dropped rows by reason", list(dropped), list(dropped.values())))
    return "\n".join(parts) + "\n"


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


def _histogram(values: np.ndarray, highest: int) -> dict[str, list[Any]]:
    counts, edges = np.histogram(values, bins=np.linspace(0, highest, min(NUM_BINS, highest) + 1))
    return {"labels": [f"{edge:,.0f}" for edge in edges[1:]], "counts": counts.tolist()}


def _plot(title: str, labels: Sequence[str], counts: Sequence[float]) -> str:
    """Horizontal bars as inline SVG."""
    height, most = 16, max([*counts, 1])
    bars = []
    for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
        y, width = i * height, 500 * count / most
        bars.append(
            f"<text x='190' y='{y + 12}' text-anchor='end'>{html.escape(str(label)[:32])}</text>"
            f"<rect x='200' y='{y + 2}' width='{width:.1f}' height='{height - 4}'/>"
            f"<text x='{205 + width:.1f}' y='{y + 12}'>{count:,}</text>"
        )
    return f"<h2>{html.escape(title)}</h2><svg width='800' height='{height * len(labels)}'>{''.join(bars)}</svg>"
