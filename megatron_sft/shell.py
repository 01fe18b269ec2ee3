"""The shell scripts and the confs, in a checkout and in an installed package, and the commands that go through them:

    megatron-sft finetune Qwen/Qwen3-0.6B [flags]        the same as examples/post_training/modelopt/finetune.sh

Not here: what the scripts make of their environment variables (conf/arguments.sh).
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_sft.errors import ConfigError

NAMES = ("finetune", "generate", "mmlu", "convert", "export")
"""Commands that are scripts too."""


def scripts() -> Path:
    """The folder of finetune.sh and the others, with conf/ in it."""
    package = Path(__file__).resolve().parent
    places = (package / "scripts", package.parent / "examples" / "post_training" / "modelopt")
    return next((place for place in places if place.is_dir()), places[0])


def confs() -> Path:
    """The folder of <org>/<model>.sh."""
    return (scripts() / "conf").resolve()


def run(name: str, argv: Sequence[str], variables: Sequence[str] = ()) -> NoReturn:
    """Becomes the script: the process goes on as bash, with this Python interpreter unless PYTHON names another.

    Args:
        name: one of NAMES.
        argv: a conf or an HF folder, then flags.
        variables: NAME=VALUE, beside those of the environment.

    Raises:
        ConfigError: there is no bash.
    """
    start = 'export PYTHON="${PYTHON:-$0}"; exec bash "$@"'
    words = ["env", *variables, "bash", "-c", start, sys.executable, str(scripts() / f"{name}.sh"), *argv]
    try:
        os.execvp("env", words)
    except OSError as error:
        raise ConfigError(
            [f"{name}: bash cannot be started ({error.strerror}). Install it, or give flags alone: --help."]
        ) from None
