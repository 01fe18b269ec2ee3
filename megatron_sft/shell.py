"""The shell scripts and the confs, in a checkout and in an installed package, and the commands that go through them:

    megatron-sft finetune Qwen/Qwen3-0.6B [flags]        the same as examples/post_training/modelopt/finetune.sh

Not here: what the scripts make of their environment variables (conf/arguments.sh).
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_sft.errors import ConfigError

NAMES = ("finetune", "generate", "mmlu", "eval", "convert", "export")
"""Commands that are scripts too."""
SCRIPTS: Mapping[str, tuple[str, Sequence[str]]] = {
    **{name: (name, ()) for name in NAMES},
    "doctor": ("finetune", ("MLM_DOCTOR=1",)),  # finetune.sh with another launcher: the same flags
}
"""Command -> (its script, NAME=VALUE beside the environment's)."""


def scripts() -> Path:
    """The folder of finetune.sh and the others, with conf/ in it."""
    package = Path(__file__).resolve().parent
    places = (package / "scripts", package.parent / "examples" / "post_training" / "modelopt")
    return next((place for place in places if place.is_dir()), places[0])


def confs() -> Path:
    """The folder of <org>/<model>.sh."""
    return (scripts() / "conf").resolve()


def run(name: str, argv: Sequence[str]) -> NoReturn:
    """Becomes the script: the process goes on as bash, with this Python interpreter unless PYTHON names another.

    Args:
        name: one of SCRIPTS.
        argv: a conf or an HF folder, then flags.

    Raises:
        ConfigError: there is no bash.
    """
    script, variables = SCRIPTS[name]
    start = 'export PYTHON="${PYTHON:-$0}"; exec bash "$@"'
    words = ["env", *variables, "bash", "-c", start, sys.executable, str(scripts() / f"{script}.sh"), *argv]
    try:
        os.execvp("env", words)
    except OSError as error:
        raise ConfigError([f"{name}: bash cannot be started ({error.strerror}). Install it, or give flags alone."]) from None
