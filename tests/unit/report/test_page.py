"""The page of runs: what is on it, that it needs nothing else, that nothing in the files can get out of its text."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from megatron_sft.__main__ import main
from megatron_sft.errors import ConfigError
from megatron_sft.report.page import MOST_BYTES, run_page
from megatron_sft.report.runs import read_runs
from tests.unit.report.runs import SOURCES, write_run

FIGURES = [
    "Loss nats per trained token",
    "Loss by source nats per trained token",
    "Learning rate",
    "Learning rate by group",
    "Gradient norm before clipping",
    "Throughput tokens per second",
    "Work TFLOP/s per GPU",
    "Step time ms",
    "Peak memory GB, of the fullest rank",
    "Waiting for data ms per step",
    "Batches prepared ahead 0: the loader is too slow",
    "arc/acc",
    "Documents by length",
    "How full packs are % of 16 tokens",
]
SECTIONS = [
    "Overview",
    "Loss",
    "Learning and gradients",
    "Speed and memory",
    "Evaluation",
    "Samples",
    "Data",
    "Rows as they are trained",
    "Starts, faults and skipped steps",
    "Command and versions",
    "Settings",
]


class Page(HTMLParser):
    """Elements, attributes and texts of a page; every element that is opened is closed in order."""

    VOID = ("meta", "link")

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.attributes += [(key, value or "") for key, value in attributes]
        if name not in self.VOID:
            self.open.append(name)
            self.texts.setdefault(name, []).append("")

    def handle_startendtag(self, name, attributes):
        self.names.append(name)
        self.attributes += [(key, value or "") for key, value in attributes]

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        for name in set(self.open):
            self.texts[name][-1] += data


def assert_self_contained(html: str) -> Page:
    page = Page(html)
    assert len(html.encode()) <= MOST_BYTES == 3 * 2**20
    assert not {"script", "img", "iframe", "object", "form", "base"} & set(page.names)
    assert "http" not in re.sub(r"<(td|pre|p|span)\b[^<]*", "", html) and "@import" not in html
    links = {value for name, value in page.attributes if name in ("href", "src", "xlink:href", "srcset", "action")}
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "cannot be shown" not in html
    return page


def test_a_run_has_every_figure_and_section(tmp_path):
    write_run(tmp_path / "<i>run")
    page = assert_self_contained(run_page(read_runs([str(tmp_path / "<i>run")])))
    assert page.texts["figcaption"] == FIGURES and page.names.count("svg") == len(FIGURES)
    assert page.texts["h2"] == SECTIONS and page.texts["h1"] == ["Training of <i>run"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    told = "\n".join(page.texts["body"])
    assert "failed (status 3): TrainingError: rank 1 </pre>" in told and "trained to the end" in told
    assert "steps without an update (--loss-spike-factor): 17." in told
    assert "python finetune.py --lr 1e-4 <b>" in told and "2.13.0" in told and "<b>tiny" in told
    assert (
        "answer <i> at 0" in told
        and "answer <i> at 30" in told
        and "at 10" not in told.partition("Samples")[2].partition("Data")[0]
    )
    assert {"Well? <b>", "Yes.\n", "Or no."} <= set(page.texts["span"])
    assert "\\u202e" in told and SOURCES[1][:-1] in told and "\u202e" not in told


def test_several_runs_stand_beside_each_other(tmp_path):
    places = [str(write_run(tmp_path / name / "out", config={"optim": {"lr": rate}})) for name, rate in (("a", 1), ("b", 2))]
    page = assert_self_contained(run_page(read_runs(places)))
    captions = page.texts["figcaption"]
    assert captions.count("Documents by length") == 1 and ", ".join(places) in page.texts["h3"], "the same data once"
    assert captions.count("Loss nats per trained token") == 1 and "Loss: maths nats per trained token" in captions
    assert f"{places[0]}, held-out" in page.texts["li"], "two folders of one name have their paths"
    assert page.texts["h1"] == ["Training: 2 runs"]
    rows = [row for row in page.texts["tr"] if row.startswith("optim.lr")]
    assert rows == ["optim.lr12", "optim.lr12"], "once among what differs, once among all"


def test_more_runs_than_colours_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="9 runs; expected at most 8"):
        read_runs([str(tmp_path)] * 9)


ODD = [
    '{"iteration": 1, "sft/loss": NaN, "grad_norm": Infinity, "lr": 1e308, "skipped_iterations": "x", "sft/epoch": null}',
    f'{{"iteration": 2, "sft/loss": {10**400}, "perf/step_ms": -1e300, "perf/tokens_per_s": 0, "eval/": true}}',
    '{"iteration": 3, "sft/loss": "2", "sft/trained_tokens": 0, "valid/loss": NaN, "sft/loss/\\ud800": 1.0}',
    '{"iteration": true}',
    '{"iteration": -1}',
    "[" * 100_000,
    "\x00",
]
ATTEMPTS = [
    {
        "event": "start",
        "config": {"checkpoint": []},
        "versions": [1],
        "rows": 7,
        "data": {"sources": 3},
        "time": {},
        "command": [],
    },
    {"event": "end", "status": {}, "error": ""},
    {"event": "start", "config": 3, "last_iteration": "x", "rows": [{"title": [], "runs": [["a", "b"]]}]},
]


def test_odd_files_make_a_page_all_the_same(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(ODD).encode())
    (tmp_path / "samples.jsonl").write_text('{"iteration": 1, "prompt": {}, "response": []}\n{"iteration": []}')
    (tmp_path / "best_checkpoint.json").write_text("[")
    for count in (0, 2, len(ATTEMPTS)):
        (tmp_path / "attempts.jsonl").write_text("\n".join(map(json.dumps, ATTEMPTS[:count])))
        html = run_page(read_runs([str(tmp_path)]))
        page = Page(html)
        assert "Loss" in page.texts["h2"] and ("cannot be shown" in html) == (count > 0)
        assert "The loss was no finite number at 1 steps, first at iteration 1." in page.texts["li"]


def test_scores_of_eval_stand_beside_each_other(tmp_path):
    write_run(tmp_path / "run")
    right = {"score": 0.5, "low": 0.25, "high": 0.75, "count": 1200, "questions": {"a": 1.0}}
    (tmp_path / "run" / "scores.json").write_text(json.dumps({"settings": {}, "tasks": {"gsm8k/chat": right}}))
    before = tmp_path / "before.json"
    before.write_text(
        json.dumps({"tasks": {"gsm8k/chat": {**right, "score": 0.125, "low": None}, "odd": 3, "<b>": {"score": "x"}}})
    )
    (tmp_path / "other.json").write_text('{"tasks": {}}')
    page = Page(run_page(read_runs([str(tmp_path / "run"), str(before)])))
    rows = [row for row in page.texts["tr"] if row.startswith("gsm8k/chat")]
    assert rows == ["gsm8k/chatscores1,2000.50000.2500 to 0.7500", f"gsm8k/chat{before}1,2000.1250"]
    with pytest.raises(ConfigError) as found:
        read_runs([str(tmp_path / "other.json")])
    assert "other.json: no scores of tasks; expected what megatron-sft eval --output writes." in str(found.value)
    assert "alone; expected the --save folder of a run too" in str(found.value)


def test_what_is_no_run_is_said_at_once(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "metrics.jsonl").mkdir()
    places = [str(tmp_path / name) for name in ("empty", "missing", "folder")]
    assert main(["report", *places, "--output", str(tmp_path / "page.html")]) == 2
    told = "".join(capsys.readouterr())
    assert all(f"{place}: " in told for place in places) and not (tmp_path / "page.html").exists()
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "x"), "--lr", "1", "--output", str(tmp_path)]) == 2
    told = "".join(capsys.readouterr())
    assert "--html has no effect on the page of a RUN" in told and "--lr has no effect" in told and "is a folder" in told
    steps = tmp_path / "metrics.jsonl"
    steps.write_text('{"iteration": 1}\n')
    assert main(["report", str(tmp_path), "--output", str(steps)]) == 2
    assert "holds something other than a page; expected a new file" in "".join(capsys.readouterr())
    assert steps.read_text() == '{"iteration": 1}\n'
    assert main(["report", "--output", "page.html"]) == 2
    assert "no training data" in "".join(capsys.readouterr())


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (360, 1200)
MEASURE = """<!doctype html><title>x</title>FRAMES<script>
onload = () => { document.title = [...document.querySelectorAll("iframe")].map(frame => { const inner = frame.contentDocument;
const drawn = [...inner.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 100);
return inner.documentElement.scrollWidth + " " + drawn.length; }).join(" "); }
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_a_browser_shows_every_figure_within_the_screen(tmp_path):
    """On a phone and on a desk, without a word on the console."""
    write_run(tmp_path / "run")
    (tmp_path / "page.html").write_text(run_page(read_runs([str(tmp_path / "run")])))
    frames = "".join(f'<iframe src="page.html" width="{width}" height="800" style="border:0"></iframe>' for width in WIDTHS)
    (tmp_path / "measure.html").write_text(MEASURE.replace("FRAMES", frames))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    flags += " --disable-component-update --allow-file-access-from-files --enable-logging=stderr --virtual-time-budget=5000"
    command = [
        CHROMIUM,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path}/measure.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    measured = [int(number) for number in re.search(r"<title>(.*?)</title>", done.stdout)[1].split()]
    assert measured[1::2] == [len(FIGURES)] * 2
    assert all(found <= width for found, width in zip(measured[::2], WIDTHS, strict=True)), measured
