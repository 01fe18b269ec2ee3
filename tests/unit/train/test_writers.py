"""Places beside metrics.jsonl, each by the package as it is, offline: a resumed run is one run there, a failed one is marked."""

import re
import sqlite3

import pytest

from megatron_sft.config.log import LogConfig
from megatron_sft.config.run import CheckpointConfig, RunConfig
from megatron_sft.errors import ConfigError, TrainingError
from megatron_sft.train.metrics import metrics_writer
from megatron_sft.train.writers import kept_id
from tests.unit.train.test_metrics import METRICS

SOURCE = "sft/loss/<b>\u4f60"


def write(save, iteration, log, error=None):
    """One attempt of a run: two steps from an iteration on."""
    save.mkdir(exist_ok=True)
    run = RunConfig(log=log, checkpoint=CheckpointConfig(save=str(save)))
    with metrics_writer(run, 0, iteration, 10) as send:
        for number in (iteration + 1, iteration + 2):
            send({**METRICS, "iteration": number, "sft/loss": float(number), SOURCE: 1.5})
        if error:
            raise error


def attempts(save, log):
    """Begins, fails, goes on and ends; another run begins."""
    with pytest.raises(TrainingError):
        write(save, 0, log, TrainingError("rank 1"))
    write(save, 2, log)
    write(save.with_name("other"), 0, log)


def ids(save, package):
    found = [(folder / f"{package}_run_id.txt").read_text().strip() for folder in (save, save.with_name("other"))]
    assert found[0] != found[1]
    return found


def test_wandb(tmp_path, monkeypatch):
    """Each start leaves a folder offline-run-TIME-ID."""
    pytest.importorskip("wandb", reason="needs the package wandb: pip install 'megatron-sft[wandb]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    attempts(tmp_path / "out", LogConfig(wandb_project="p", wandb_exp_name="n", wandb_group="g", wandb_mode="offline"))
    folders = [path.name for path in (tmp_path / "out" / "wandb").glob("offline-run-*")]
    assert len(folders) in (1, 2) and {name.rpartition("-")[2] for name in folders} == {ids(tmp_path / "out", "wandb")[0]}


def test_mlflow(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow: pip install 'megatron-sft[mlflow]'")
    place = f"sqlite:///{tmp_path}/mlflow.db"
    attempts(tmp_path / "out", LogConfig(mlflow_experiment="e <b>", mlflow_run_name="n", mlflow_tracking_uri=place))
    client = mlflow.MlflowClient(tracking_uri=place)
    first, other = ids(tmp_path / "out", "mlflow")
    history = client.get_metric_history(first, "sft/loss")
    assert [(point.step, point.value) for point in history] == [(number, float(number)) for number in (1, 2, 3, 4)]
    run = client.get_run(first)
    assert run.info.status == "FINISHED" and run.data.params["train.micro_batch_size"] == "1" and run.info.run_name == "n"
    assert run.data.metrics["sft/loss/_b_\u4f60"] == 1.5
    assert client.get_run(other).info.experiment_id == run.info.experiment_id
    with pytest.raises(TrainingError):
        write(tmp_path / "out", 4, LogConfig(mlflow_experiment="e <b>", mlflow_tracking_uri=place), TrainingError("x"))
    assert client.get_run(first).info.status == "FAILED"
    with pytest.raises(ConfigError, match=r"--mlflow-experiment e: .*Check --mlflow-tracking-uri"):
        write(tmp_path / "third", 0, LogConfig(mlflow_experiment="e", mlflow_tracking_uri="nothing://x"))


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="needs the package trackio: pip install 'megatron-sft[trackio]'")
    attempts(tmp_path / "out", LogConfig(trackio_project="p", trackio_group="g"))
    first, other = ids(tmp_path / "out", "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        rows = database.execute("select run_name, step from metrics order by id").fetchall()
    assert rows == [*((first, number) for number in (1, 2, 3, 4)), (other, 1), (other, 2)]


def test_swanlab(tmp_path, monkeypatch):
    """Each start leaves a folder run-TIME-ID."""
    pytest.importorskip("swanlab", reason="needs the package swanlab: pip install 'megatron-sft[swanlab]'")
    attempts(tmp_path / "out", LogConfig(swanlab_project="p", swanlab_exp_name="n", swanlab_mode="offline"))
    folders = [path.name for path in (tmp_path / "out" / "swanlog").glob("run-*")]
    assert len(folders) in (1, 2) and {name.rpartition("-")[2] for name in folders} == {ids(tmp_path / "out", "swanlab")[0]}


def test_an_id_is_kept_where_training_goes_on_and_new_where_it_begins(tmp_path):
    first = kept_id(str(tmp_path), "wandb", 0)
    assert re.fullmatch("[0-9a-f]{8}", first)
    assert kept_id(str(tmp_path), "wandb", 5) == first != kept_id(str(tmp_path), "mlflow", 5)
    assert kept_id(str(tmp_path), "wandb", 0) != first
    (tmp_path / "wandb_run_id.txt").write_text("../x")
    assert re.fullmatch("[0-9a-f]{8}", kept_id(str(tmp_path), "wandb", 5))
    assert kept_id(None, "wandb", 5, lambda: "new") == "new"
