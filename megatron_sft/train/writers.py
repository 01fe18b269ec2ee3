"""Places that metrics are sent to beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio, SwanLab.

A writer has two methods, `write(numbers, iteration)` and `close(exit_code)`. Each but TensorBoard is an extra, imported where
it is used. A run that goes on from a checkpoint is the same run there, by the name or id that its --save folder keeps.
"""

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_sft.config.run import RunConfig
from megatron_sft.errors import ConfigError
from megatron_sft.files import write_whole
from megatron_sft.log import logger

Numbers = Mapping[str, int | float]
RUN_ID = "{}_run_id.txt"
"""In the --save folder, by package."""
MOST_VALUE = 500
"""Letters of a setting that MLflow keeps in every version."""


class Writer(Protocol):
    """One place."""

    def write(self, numbers: Numbers, iteration: int) -> None:
        """Sends the numbers of one iteration."""

    def close(self, exit_code: int) -> None:
        """Sends what is left; another exit code than 0 marks the run as failed, where a place has such a mark."""


def open_writers(run: RunConfig, iteration: int, tensorboard: str | None) -> list[Writer]:
    """Everything that the flags name.

    Args:
        run: its log section; checkpoint.save keeps the ids.
        iteration: that training starts after.
        tensorboard: folder; None: none.

    Raises:
        ConfigError: a place cannot be reached, or its package is missing.
        OSError: TensorBoard's folder cannot be written.
    """
    log = run.log
    wanted: list[tuple[str | None, Callable[[], Writer]]] = [
        (tensorboard, lambda: TensorBoard(str(tensorboard), iteration)),
        (log.wandb_project, lambda: WandB(run, iteration)),
        (log.mlflow_experiment, lambda: MLflow(run, iteration)),
        (log.trackio_project, lambda: Trackio(run, iteration)),
        (log.swanlab_project, lambda: SwanLab(run, iteration)),
    ]
    opened: list[Writer] = []
    try:
        for name, make in wanted:
            if name is not None:
                opened.append(make())
    except (ConfigError, OSError):
        for writer in opened:
            writer.close(exit_code=1)
        raise
    return opened


def kept_id(save: str | None, package: str, iteration: int, new: Callable[[], str] = lambda: secrets.token_hex(4)) -> str:
    """The id in the --save folder where training goes on; where it begins a new one, which is kept there."""
    if save is None:
        return new()
    file = Path(save) / RUN_ID.format(package)
    known = file.read_text(encoding="ascii", errors="replace").strip() if iteration and file.is_file() else ""
    if not re.fullmatch("[0-9a-z]{8,64}", known):
        known = new()
        write_whole(file, known + "\n")
    return known


class TensorBoard:
    """Event files."""

    def __init__(self, folder: str, iteration: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError([f"--tensorboard-dir {folder} needs tensorboard ({error}). Run: pip install tensorboard"]) from None
        self._writer: Any = SummaryWriter(folder, purge_step=iteration + 1)

    def write(self, numbers: Numbers, iteration: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
        self._writer.file_writer.add_summary(Summary(value=values), iteration)  # one event: add_scalar takes 12 times as long
        self._writer.flush()  # by itself it does so every 2 minutes, which a killed process may not live

    def close(self, exit_code: int) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, which buffers and retries by itself."""

    def __init__(self, run: RunConfig, iteration: int):
        import wandb  # config/log.py says what to install where it is missing

        log, save = run.log, run.checkpoint.save
        try:
            self.run = wandb.init(
                project=log.wandb_project,
                name=log.wandb_exp_name,
                group=log.wandb_group,
                mode=log.wandb_mode,
                config=json.loads(run.to_json()),
                dir=save,
                id=kept_id(save, "wandb", iteration),
                resume="allow" if save else None,
            )
        except (wandb.errors.Error, OSError) as error:
            project = f"--wandb-project {log.wandb_project}: {str(error).rstrip('.')}"
            raise ConfigError([f"{project}. Expected a run of W&B. Log in (wandb login), or use --wandb-mode offline."]) from None
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")  # W&B's own steps never go back, as a resumed run may

    def write(self, numbers: Numbers, iteration: int) -> None:
        self.run.log(dict(numbers))

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


class MLflow:
    """An experiment's run, written in the background; settings as parameters, which a run takes once."""

    def __init__(self, run: RunConfig, iteration: int):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._error, self._last, log = MlflowException, None, run.log
        try:
            self._client = MlflowClient(tracking_uri=log.mlflow_tracking_uri)
            self._id = kept_id(run.checkpoint.save, "mlflow", iteration, lambda: self._created(run))
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException as error:
            place = f"--mlflow-experiment {log.mlflow_experiment}: {str(error)[:300].rstrip('.')}"
            raise ConfigError(
                [f"{place}. Expected an MLflow server or database. Check --mlflow-tracking-uri and MLFLOW_TRACKING_URI."]
            ) from None

    def _created(self, run: RunConfig) -> str:
        from mlflow.entities import Param

        name = str(run.log.mlflow_experiment)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        created = str(self._client.create_run(number, run_name=run.log.mlflow_run_name).info.run_id)
        sections = json.loads(run.to_json())
        flat = {f"{section}.{key}": str(value)[:MOST_VALUE] for section, part in sections.items() for key, value in part.items()}
        settings = [Param(key, value) for key, value in flat.items()]
        for first in range(0, len(settings), 100):  # the most that MLflow takes at once
            self._client.log_batch(created, params=settings[first : first + 100])
        return created

    def write(self, numbers: Numbers, iteration: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(re.sub(r"[^\w./: -]", "_", name), float(value), now, iteration) for name, value in numbers.items()]
        self._last = self._client.log_batch(self._id, metrics=values, synchronous=False)

    def close(self, exit_code: int) -> None:
        try:
            if self._last is not None:
                self._last.wait()
            self._client.set_terminated(self._id, "FAILED" if exit_code else "FINISHED")
        except self._error as error:
            logger.warning("MLflow did not take all metrics: %s. metrics.jsonl has them.", str(error)[:300])


class Trackio:
    """A project on this machine, or on a Space (TRACKIO_SPACE_ID)."""

    def __init__(self, run: RunConfig, iteration: int):
        import trackio

        log = run.log
        self._run = trackio.init(
            project=str(log.trackio_project),
            name=log.trackio_name or kept_id(run.checkpoint.save, "trackio", iteration),
            group=log.trackio_group,
            config=json.loads(run.to_json()),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, numbers: Numbers, iteration: int) -> None:
        self._run.log(dict(numbers), step=iteration)

    def close(self, exit_code: int) -> None:
        self._run.finish()


class SwanLab:
    """SwanLab's cloud, or files for `swanlab sync`."""

    def __init__(self, run: RunConfig, iteration: int):
        import swanlab

        log, save = run.log, run.checkpoint.save
        try:
            self._run = swanlab.init(
                project=log.swanlab_project,
                name=log.swanlab_exp_name,
                mode=log.swanlab_mode,
                config=json.loads(run.to_json()),
                log_dir=f"{save}/swanlog" if save else None,
                id=kept_id(save, "swanlab", iteration, lambda: secrets.token_hex(10)),
                resume="allow",
                reinit=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            project = f"--swanlab-project {log.swanlab_project}: {str(error).rstrip('.')}"
            raise ConfigError(
                [f"{project}. Expected a run of SwanLab. Log in (swanlab login), or use --swanlab-mode offline."]
            ) from None

    def write(self, numbers: Numbers, iteration: int) -> None:
        self._run.log(dict(numbers), step=iteration)

    def close(self, exit_code: int) -> None:
        self._run.finish(state="crashed" if exit_code else "success")
