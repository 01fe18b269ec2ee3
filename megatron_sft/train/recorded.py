"""Writes attempts.jsonl of a run: how it was started, on what, with which data, and how it ended. On rank 0 only."""

import contextlib
import datetime
import json
import platform
import socket
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

from megatron_sft import __version__
from megatron_sft.attempts import END, START, append
from megatron_sft.config.run import RunConfig
from megatron_sft.errors import TrainingError
from megatron_sft.parallel import Ranks

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "datasets", "numpy", "transformer-engine")


def facts(run: RunConfig, ranks: Ranks, command: str) -> dict[str, Any]:
    """What the page of a run says of its start, beside progress and data."""
    return {
        "command": command,
        "processes": ranks.world_size,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "versions": versions(),
        "config": json.loads(run.to_json()),
    }


def versions() -> dict[str, str]:
    """{package: version} of those that are installed, and of Python."""
    by_package = {"megatron-sft": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            by_package[name] = metadata.version(name)
    return by_package


@contextlib.contextmanager
def recorded(save: str | None, rank: int, start: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Adds the line of a start, then that of the end, with whatever the block put into the dict that it gets.

    Raises:
        TrainingError: the first line cannot be written.
    """
    end: dict[str, Any] = {}
    if rank != 0 or not save:
        yield end
        return
    try:
        append(save, {"event": START, "time": _now(), **start})
    except OSError as error:
        raise TrainingError(
            f"{save}/attempts.jsonl: cannot be written ({error.strerror}); expected a writable folder with room. Make room and "
            "give the same command again."
        ) from None
    try:
        yield end
    except BaseException as error:
        end |= {"status": getattr(error, "exit_status", 1), "error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk: a page says then that no end was written
            append(save, {"event": END, "time": _now(), **end})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
