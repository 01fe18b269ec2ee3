"""A tiny model and rows on disk, and the command line of finetune.py."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gloo import RunningScript, run_script
from tests.text_models import text_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder of a random Llama with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    text_model("llama", folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 conversations of 40 to 150 tokens."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for number in range(23):
            question = {"role": "user", "content": f"What is {number} plus {number * 7 % 5}?" + " Tell me." * (number % 4)}
            answer = {"role": "assistant", "content": f"It is {number + number * 7 % 5}." + " Really." * (number % 5)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


@pytest.fixture
def finetune(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> Any:
    """Runs finetune.py on the tiny model; flags are added to those that every run needs."""

    def run(*flags: Any, processes: int = 1, needs: bool = True) -> subprocess.CompletedProcess[str]:
        return run_script("finetune.py", [*(needed if needs else []), *flags], processes)

    needed = _needed_flags(tiny_folder, rows_file, tmp_path)
    return run


@pytest.fixture
def started(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> Iterator[Any]:
    """The same, but the test goes on while it runs; what still runs at the test's end is killed."""
    running = []

    def start(*flags: Any) -> RunningScript:
        running.append(RunningScript("finetune.py", [*_needed_flags(tiny_folder, rows_file, tmp_path), *flags]))
        return running[-1]

    yield start
    for script in running:
        for rank in script.ranks:
            rank.kill()


def _needed_flags(model: Path, rows: Path, work: Path) -> list[Any]:
    flags = ["--load", model, "--tokenizer-model", model, "--finetune-hf-dataset", rows]
    return [*flags, "--seq-length", "256", "--data-cache-path", work / "cache", "--num-workers", "1"]


def metrics_of(save: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
