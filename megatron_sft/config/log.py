"""What of a run is logged where, as flags, and what contradicts. A section of RunConfig (run.py)."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from megatron_sft.config.fields import Length, Words, flag_of


@dataclass(frozen=True)
class LogConfig:
    log_interval: Annotated[Length, "iterations"] = 1
    """Of a console line; metrics.jsonl has one per iteration all the same."""
    tensorboard_dir: Annotated[str, "folder"] | None = None
    """Where TensorBoard files go; None: none."""
    wandb_project: str | None = None
    """Weights & Biases project; None: none."""
    wandb_exp_name: str | None = None
    """Name of the run there."""
    wandb_group: str | None = None
    """Group of the run there."""
    wandb_mode: Annotated[str, Words("online", "offline", "disabled")] | None = None
    """None: as WANDB_MODE says."""
    mlflow_experiment: str | None = None
    """MLflow experiment; None: none."""
    mlflow_run_name: str | None = None
    """Name of the run there."""
    mlflow_tracking_uri: Annotated[str, "place"] | None = None
    """Server or database; None: as MLFLOW_TRACKING_URI says."""
    trackio_project: str | None = None
    """Trackio project; None: none."""
    trackio_name: str | None = None
    """Name of the run there; None: one that its --save folder keeps."""
    trackio_group: str | None = None
    """Group of the run there."""
    swanlab_project: str | None = None
    """SwanLab project; None: none."""
    swanlab_exp_name: str | None = None
    """Name of the run there."""
    swanlab_mode: Annotated[str, Words("online", "offline", "disabled")] | None = None
    """None: as SWANLAB_MODE says."""


NAMES: Mapping[str, str] = {
    "wandb": "wandb_project",
    "mlflow": "mlflow_experiment",
    "trackio": "trackio_project",
    "swanlab": "swanlab_project",
}
"""Package that is an extra -> the field without which nothing is sent to it."""


def log_problems(log: LogConfig) -> list[str]:
    """Settings of a place that is not written to, and packages that are missing, one sentence each."""
    problems = []
    for package, needed in NAMES.items():
        fields = [name for name in vars(log) if name.startswith(package) and name != needed and getattr(log, name) is not None]
        if getattr(log, needed) is None and fields:
            told = ", ".join(map(flag_of, fields))
            problems.append(f"{told} without {flag_of(needed)}: nothing is sent. Add it, or leave it out.")
        if getattr(log, needed) is not None and not is_installed(package):
            missing = f"{flag_of(needed)} needs the package {package}, which is not installed"
            problems.append(f"{missing}. Run: pip install {package}. Or leave it out.")
    return problems


def is_installed(package: str) -> bool:
    """Whether it can be imported; a folder of that name, such as W&B's own logs, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
