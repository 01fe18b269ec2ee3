"""The page of one or several runs: figures first, then data, rows, samples, faults, command and settings.

    1. read the runs (runs.py)
    2. each entry of SECTIONS makes its part, or nothing where no run has what it shows
    3. one page (pages/markup.py), at most MOST_BYTES

A colour is a run; of one run alone, a source or a group of parameters. Not here: what the files hold (runs.py).
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_sft import __version__
from megatron_sft.data.report import packs_part, rows_part
from megatron_sft.pages.figures import Series, chart, figures
from megatron_sft.pages.markup import LEGEND, Markup, details, join, page, pairs, swatch, table, tag, trained_text
from megatron_sft.report.findings import findings, summary
from megatron_sft.report.runs import Run, flat, is_number

MOST_BYTES = 3 << 20
MOST_FIGURES, MOST_LINES, MOST_ROWS, MOST_TEXT = 24, 8, 40, 4000
CHARTS = (
    (
        "Loss",
        (
            ("Loss", "nats per trained token", "sft/loss", "valid/loss"),
            ("Bits per byte", "of held-out text", "valid/bits_per_byte", ""),
        ),
    ),
    (
        "Learning and gradients",
        (("Learning rate", "", "lr", ""), ("Gradient norm", "before clipping", "grad_norm", "")),
    ),
    (
        "Speed and memory",
        (
            ("Throughput", "tokens per second", "perf/tokens_per_s", ""),
            ("Work", "TFLOP/s per GPU", "perf/tflops_per_gpu", ""),
            ("Model FLOPs utilisation", "share of the device's peak", "perf/mfu", ""),
            ("Step time", "ms", "perf/step_ms", ""),
            ("Peak memory", "GB, of the fullest rank", "perf/peak_memory_gb", ""),
            ("Waiting for data", "ms per step", "data/wait_ms", ""),
            ("Batches prepared ahead", "0: the loader is too slow", "data/prefetch_queue_depth", ""),
        ),
    ),
)
"""Section -> (title, unit, line, dashed line) of its figures."""
LOGARITHMIC = ("grad_norm", "perf/step_ms", "data/wait_ms")


def run_page(runs: Sequence[Run]) -> str:
    """The whole page; nothing in it asks the network for anything."""
    title = f"Training of {runs[0].name}" if len(runs) == 1 else f"Training: {len(runs)} runs"
    said = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    foot = f"megatron-sft {__version__} report, {said}. Loss: nats per trained token; GB: 10^9 bytes."
    sections = [(head, part) for head, make in SECTIONS if (part := _part(make, runs))]
    text = page(title, sections, _lead(runs), foot)
    if len(text.encode()) > MOST_BYTES:
        kept = [(head, part) for head, part in sections if len(part.encode()) < MOST_BYTES // len(sections)]
        left = ", ".join(head for head, part in sections if len(part.encode()) >= MOST_BYTES // len(sections))
        text = page(title, kept, _lead(runs), f"{foot} Left out because the page would be too large: {left}.")
    return text


def _part(make: Callable[[Sequence[Run]], Markup | str], runs: Sequence[Run]) -> Markup | str:
    """A section; one whose file somebody changed into something else says so instead."""
    try:
        return make(runs)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return tag(
            "p", f"cannot be shown: the run's file has other values than this release writes ({error!r:.200})", 'class="warn"'
        )


def _lead(runs: Sequence[Run]) -> Markup:
    if len(runs) == 1:
        return tag("p", _sentence(runs[0]), 'class="soft"')
    legend = (
        tag("li", join([swatch(number), run.name, tag("span", f" {_sentence(run)}", 'class="soft"')]))
        for number, run in enumerate(runs)
    )
    return tag("ul", join(legend), 'class="legend"')


def _sentence(run: Run) -> str:
    """Model, device and what became of the run."""
    load = flat(run.config or {}).get("checkpoint.load")
    said = [str(load).rstrip("/").rsplit("/", 1)[-1] if load else "", str(run.said("device") or "")]
    if processes := run.said("processes"):
        said.append(f"{processes} process{'es' if processes != 1 else ''}")
    if run.attempts:
        said.append(run.attempts[-1].outcome.partition(":")[0])
    return ", ".join(filter(None, said))


def _overview(runs: Sequence[Run]) -> Markup:
    summaries = [summary(run) for run in runs]
    if len(runs) == 1:
        figures_of_run: Markup = pairs(summaries[0].items())
    else:
        names = list(dict.fromkeys(name for one in summaries for name in one))
        rows = [(name, *(one.get(name, "") for one in summaries)) for name in names]
        figures_of_run = table(["", *(run.name for run in runs)], rows)
    said = [(run.name if len(runs) > 1 else "", line) for run in runs for line in findings(run)]
    lines = (tag("li", join([tag("b", f"{name}: ") if name else "", line])) for name, line in said)
    return join([figures_of_run, tag("ul", join(lines), 'class="said"') if said else ""])


def _charts(section: str) -> Callable[[Sequence[Run]], Markup | str]:
    """What makes the figures of one entry of CHARTS."""

    def make(runs: Sequence[Run]) -> Markup | str:
        parts = []
        for title, unit, name, dashed in dict(CHARTS)[section]:
            series = _series(runs, name, dashed)
            if series:
                parts.append(chart(title, unit, series, name in LOGARITHMIC, bool(dashed) or len(runs) > 1))
            if name == "lr":
                parts += _by_part(runs, "Learning rate", "group", "", "lr/")
        if section == "Loss":
            parts += _by_part(runs, "Loss", "source", "nats per trained token", "sft/loss/", "valid/loss/")
        return figures(parts) if parts else ""

    return make


def _series(runs: Sequence[Run], name: str, dashed: str = "") -> list[Series]:
    """A line a run, and a dashed one for what is measured now and then; steps without an update stand as points."""
    lines = []
    for colour, run in enumerate(runs):
        whose = f"{run.name}, " if len(runs) > 1 else ""
        for key, what, style in ((name, "train", "line"), (dashed, "held-out", "dashed")):
            x, y = run.points(key) if key else ([], [])
            label = f"{whose}{what}" if dashed else run.name
            if x:
                lines.append(Series(label, x, y, colour if len(runs) > 1 or style == "line" else 1, style))
        skipped = set(run.skipped()) if name == "sft/loss" else set()
        x, y = run.points(name)
        if kept := [(i, value) for i, value in zip(x, y, strict=True) if i in skipped]:
            lines.append(Series(f"{whose}skipped", [i for i, _ in kept], [value for _, value in kept], 5, "points"))
    return lines


def _by_part(runs: Sequence[Run], title: str, noun: str, unit: str, prefix: str, dashed: str = "") -> list[Markup]:
    """Numbers of sources or groups: of one run the parts beside each other in one figure, of several a figure a part."""
    parts = list(dict.fromkeys(name.removeprefix(prefix) for run in runs for name in run.names(prefix)))
    if not parts:
        return []
    if len(runs) > 1:
        made = ((part, _series(runs, prefix + part, dashed and dashed + part)) for part in parts[:MOST_FIGURES])
        return [chart(f"{title}: {part}", unit, series, legend=True) for part, series in made if series]
    made_of = [(f"{title} by {noun}", prefix), *([(f"Held-out {title.lower()} by {noun}", dashed)] if dashed else [])]
    charts = []
    for head, start in made_of:
        lines = [(part, *runs[0].points(start + part)) for part in parts]
        lines = [line for line in lines if line[1]]
        for first in range(0, len(lines), MOST_LINES):
            shown = lines[first : first + MOST_LINES]
            style = "dashed" if start == dashed else "line"
            charts.append(chart(head, unit, [Series(n, x, y, i, style) for i, (n, x, y) in enumerate(shown)], legend=True))
    return charts[:MOST_FIGURES]


def _evaluation(runs: Sequence[Run]) -> Markup | str:
    """Scores of tasks: first, last and best of each, and a figure where there is more than one."""
    names = list(dict.fromkeys(name for run in runs for name in run.names("eval/")))
    if not names:
        return _scores(runs)
    rows: list[tuple[Any, ...]] = []
    parts: list[Markup] = []
    for name in names:
        for run in runs:
            x, y = run.points(name)
            if x:
                best = max(range(len(y)), key=y.__getitem__)
                whose = (run.name,) if len(runs) > 1 else ()
                rows.append((name.removeprefix("eval/"), *whose, f"{y[0]:.4g}", f"{y[-1]:.4g}", f"{y[best]:.4g}", f"{x[best]:,}"))
        series = _series(runs, name)
        if any(len(one.x) > 1 for one in series) and len(parts) < MOST_FIGURES:
            parts.append(chart(name.removeprefix("eval/"), "", series, legend=len(runs) > 1))
    head = ["score", *(["run"] if len(runs) > 1 else []), "first", "last", "highest", "at iteration"]
    shown = table(head, rows, (0, 1) if len(runs) > 1 else (0,))
    return join([shown, figures(parts) if parts else "", _scores(runs)])


def _scores(runs: Sequence[Run]) -> Markup | str:
    """What `megatron-sft eval` wrote, task by task, a line a file."""
    files = [(run.name, scores) for run in runs for scores in run.scores]
    rows = []
    for task in dict.fromkeys(name for _, scores in files for name in scores.tasks):
        for name, scores in files:
            if said := scores.tasks.get(task):
                whose = f"{name}, {scores.name}" if len(runs) > 1 else scores.name
                low, high = (said.get(end) for end in ("low", "high"))
                between = f"{low:.4f} to {high:.4f}" if is_number(low) and is_number(high) else ""
                rows.append((task, whose, _count(said.get("count")), f"{said['score']:.4f}", between))
    return table(["task", "scores in", "questions", "score", "95 % interval"], rows, (0, 1, 4)) if rows else ""


def _data(runs: Sequence[Run]) -> Markup | str:
    """Of runs with the same data once."""
    reports = [run.said("data") for run in runs]
    parts = []
    for number, report in enumerate(reports):
        if isinstance(report, Mapping) and report not in reports[:number]:
            names = ", ".join(run.name for run, other in zip(runs, reports, strict=True) if other == report)
            parts += [tag("h3", names) if len(runs) > 1 else "", rows_part(report), packs_part(report)]
    return join(parts) if parts else ""


def _rows(runs: Sequence[Run]) -> Markup | str:
    """Rows as they were trained; of runs with the same ones once."""
    texts: dict[str, Markup] = {}
    for run in runs:
        for row in (run.said("rows") or [])[:MOST_ROWS]:
            shown = [(str(part)[:MOST_TEXT], float(weight)) for part, weight in row["runs"]]
            texts[str(row["title"])] = join([tag("h3", row["title"]), trained_text(shown)])
    return join([LEGEND, *texts.values()]) if texts else ""


def _samples(runs: Sequence[Run]) -> Markup | str:
    """Answers to the same prompts, before, while and after training; the newest line of a prompt and iteration counts."""
    answers: dict[str, dict[tuple[str, int], str]] = {}
    for run in runs:
        for line in run.samples:
            if isinstance(line.get("iteration"), int) and "prompt" in line and "response" in line:
                own = answers.setdefault(str(line["prompt"]), {})
                own[run.name, line["iteration"]] = str(line["response"])
    parts: list[Markup] = []
    for prompt, own in list(answers.items())[:MOST_ROWS]:
        parts.append(tag("h3", prompt[:MOST_TEXT]))
        for name in dict.fromkeys(run for run, _ in own):
            taken = [number for run, number in own if run == name]
            for number in sorted({min(taken), max(taken)}):
                whose = f"{name}, " if len(runs) > 1 else ""
                label = tag("p", f"{whose}iteration {number:,}", 'class="soft"')
                parts += [label, tag("pre", own[name, number][:MOST_TEXT])]
    return join(parts)


def _faults(runs: Sequence[Run]) -> Markup | str:
    """Every start of a run with its end, and the steps that were not applied."""
    rows, notes = [], []
    for run in runs:
        whose = f"{run.name}: " if len(runs) > 1 else ""
        for attempt in run.attempts:
            start, end = attempt.start, attempt.end or {}
            outcome = tag("span", attempt.outcome[:MOST_TEXT], 'class="warn"' if attempt.is_fault else "")
            begun = _count(start.get("iteration"))
            rows.append((whose + _time(start), _time(end), outcome, begun, _count(end.get("iteration"))))
        if skipped := run.skipped():
            listed = ", ".join(f"{number:,}" for number in skipped[:MOST_ROWS])
            more = f" and {len(skipped) - MOST_ROWS:,} more" if len(skipped) > MOST_ROWS else ""
            notes.append(tag("p", f"{whose}steps without an update (--loss-spike-factor): {listed}{more}.", 'class="warn"'))
        elif run.attempts:
            notes.append(tag("p", f"{whose}no step was skipped."))
    head = ["started (UTC)", "ended", "how", "from iteration", "to"]
    return join([table(head, rows, (0, 1, 2)) if rows else "", *notes]) if rows or notes else ""


def _time(line: Mapping[str, Any]) -> str:
    """2026-11-24T23:12:31+00:00 -> 2026-11-24 23:12:31"""
    return str(line.get("time", ""))[:19].replace("T", " ")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _command(runs: Sequence[Run]) -> Markup | str:
    """What to type to have the run again, and what it ran on."""
    parts = []
    for run in runs:
        if command := run.said("command"):
            parts += [tag("h3", run.name) if len(runs) > 1 else "", tag("pre", command)]
    told = [
        dict(run.said("versions") or {}) | {"device": run.said("device") or "", "host": run.said("host") or ""} for run in runs
    ]
    names = list(dict.fromkeys(name for one in told for name, value in one.items() if value))
    if names:
        rows = [(name, *(one.get(name, "") for one in told)) for name in names]
        parts.append(table(["", *(run.name for run in runs)] if len(runs) > 1 else [], rows, range(len(runs) + 1)))
    return join(parts) if parts else ""


def _settings(runs: Sequence[Run]) -> Markup | str:
    """Of several runs first what differs between them, then all settings by a click."""
    told = [flat(run.config or {}) for run in runs]
    names = sorted({name for one in told for name in one})
    if not names:
        return ""
    head = ["setting", *(run.name for run in runs)] if len(runs) > 1 else ["setting", "value"]
    rows = {name: (name, *(_shown(one.get(name)) for one in told)) for name in names}
    words = range(len(head))
    parts: list[Markup] = []
    if len(runs) > 1:
        other = [rows[name] for name in names if len(set(rows[name][1:])) > 1]
        parts += [tag("h3", "What differs"), table(head, other, words) if other else tag("p", "Nothing.")]
    parts.append(details(f"All {len(names)} settings", table(head, rows.values(), words)))
    return join(parts)


def _shown(value: Any) -> str:
    return "" if value is None else str(value)[:MOST_TEXT]


SECTIONS: tuple[tuple[str, Callable[[Sequence[Run]], Markup | str]], ...] = (
    ("Overview", _overview),
    *((head, _charts(head)) for head, _ in CHARTS),
    ("Evaluation", _evaluation),
    ("Samples", _samples),
    ("Data", _data),
    ("Rows as they are trained", _rows),
    ("Starts, faults and skipped steps", _faults),
    ("Command and versions", _command),
    ("Settings", _settings),
)
