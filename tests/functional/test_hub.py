"""The scripts by names alone: model and rows come from a hub on this machine, nothing else is named."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.functional.conftest import metrics_of
from tests.hub_server import Hub, Repository, serving

SCRIPTS = Path(__file__).parents[2] / "examples/post_training/modelopt"
CONFIGS = "---\nconfigs:\n{}---\n"
CONFIG = "- config_name: {}\n  data_files:\n{}"
SPLIT = "  - split: {}\n    path: {}/{}-*.parquet\n"


@pytest.fixture(scope="module")
def hub(tiny_folder: Path, rows_file: Path) -> Iterator[Hub]:
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    question = {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "sums"}
    with serving() as started:
        files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
        started.models["tiny/tiny"] = Repository(files | {"pytorch_model.bin": b"pickle"})
        started.datasets["tiny/chats"] = dataset({"one": {"train": rows[:1]}, "many": {"train": rows}})
        subjects = {"sums": {"test": [question], "dev": [question]}, "all": {"test": [question] * 3, "dev": [question]}}
        started.datasets["cais/mmlu"] = dataset(subjects)
        yield started


def dataset(configs: dict[str, dict[str, list[dict]]]) -> Repository:
    """A data set with several configurations, as its README says."""
    files, listed = {}, ""
    for config, splits in configs.items():
        listed += CONFIG.format(config, "".join(SPLIT.format(split, config, split) for split in splits))
        for split, rows in splits.items():
            content = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
            files[f"{config}/{split}-00000-of-00001.parquet"] = content.getvalue()
    return Repository({"README.md": CONFIGS.format(listed).encode(), **files})


def test_finetune_and_mmlu_by_name_on_two_processes(hub: Hub, tmp_path: Path) -> None:
    conf = tmp_path / "tiny.sh"
    conf.write_text('HF_MODEL_CKPT="${HF_MODEL_CKPT:-tiny/tiny}"\nMODEL_ARGS=(--seq-length 256)\n')
    variables = hub.environment(tmp_path / "home", XDG_CACHE_HOME=str(tmp_path / "cache"), MLM_MODEL_SAVE=str(tmp_path / "out"))
    variables |= {"DATASET": "tiny/chats", "DP": "2"}
    flags = "--finetune-data-config many --train-iters 2 --num-workers 1 --log-interval 1"
    done = run("finetune.sh", conf, {**variables, "MLM_EXTRA_ARGS": flags})
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(tmp_path / "out")) == 2
    assert hub.downloads().count("model.safetensors") == 1
    assert "pytorch_model.bin" not in hub.downloads()
    assert (tmp_path / "cache/megatron_sft/tokens").is_dir()

    hub.asked.clear()
    scores = tmp_path / "scores.json"
    variables |= {"MLM_MODEL_CKPT": str(tmp_path / "out"), "MLM_EXTRA_ARGS": f"--output {scores}", "DP": "1"}
    done = run("mmlu.sh", conf, variables)
    assert done.returncode == 0, done.stderr
    assert json.loads(scores.read_text())["total"] == 3
    assert [name for name in hub.downloads() if name.endswith(".safetensors")] == []


def test_several_processes_say_once_what_the_hub_lacks(hub: Hub, tmp_path: Path) -> None:
    conf = tmp_path / "tiny.sh"
    conf.write_text("HF_MODEL_CKPT=tiny/nothing\nMODEL_ARGS=()\n")
    done = run("finetune.sh", conf, hub.environment(tmp_path / "home", DP="2", DATASET="tiny/chats"))
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("--load tiny/nothing: no such folder, and the hub shows no model of that name") == 1
    assert "Traceback" not in done.stdout + done.stderr


def run(script: str, conf: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    variables = {**variables, "PYTHON": sys.executable}
    return subprocess.run([SCRIPTS / script, str(conf)], env=variables, capture_output=True, text=True, check=False, timeout=300)
