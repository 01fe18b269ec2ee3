"""The errors that a user can meet. Everything else that is raised is our own bug.

Each message has four parts: where, what was found, what was expected, what to do.
Entry scripts print the message without a traceback and exit with `exit_status`.
"""

import sys
from collections.abc import Sequence


class UserError(Exception):
    """Base of every error that the user can mend; `exit_status` is the process's."""

    exit_status = 2
    is_said = False
    """Another process has the same error and prints it, or has printed it."""


class ConfigError(UserError):
    """Contradicting or impossible settings, all of them at once.

    Args:
        problems: one complete sentence each, in the order in which a user should mend them.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  - ".join([f"{head} in the configuration:", *self.problems]))

    def __reduce__(self) -> tuple[type, tuple[Sequence[str]]]:
        """So that other processes get it whole."""
        return ConfigError, (self.problems,)


class DataError(UserError):
    """Input rows that cannot be used; the message starts with `file:line`."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, partial or of another model."""


class SavingError(CheckpointError):
    """A checkpoint or an HF folder could not be written although the run began (a full disk); earlier ones are untouched."""

    exit_status = 3


class TrainingError(UserError):
    """Training met a value or a state that it must not continue from (NaN, a dead rank, a full disk)."""

    exit_status = 3


def missing_package(error: ModuleNotFoundError) -> str:
    """The message for a Python without what megatron-sft needs, most often one whose environment is not active.

    Raises:
        ModuleNotFoundError: `error` itself, if a module of our own is missing.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "megatron_sft"):
        raise error
    return (
        f"{sys.executable}: this Python has no package {package}; expected the one that megatron-sft is installed in. Activate "
        "its environment (. .venv/bin/activate), or name its interpreter (PYTHON=.venv/bin/python for the scripts)."
    )
