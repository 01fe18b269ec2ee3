"""How this process was started: its rank, its limits, its terminal, and the command that goes on with its results.

Not here: what megatron-core and torch read from the environment themselves (core_compat.py).
"""

import os
import re
import resource
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from megatron_sft.errors import ConfigError


def process_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher set them; (0, 1, 0) without a launcher.

    Raises:
        ConfigError: they are no numbers, or some that belong to them are missing.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    texts = {name: os.environ.get(name) or default for name, default in defaults.items()}
    wrong = [f"{name}={text!r}" for name, text in texts.items() if not re.fullmatch(r"[0-9]{1,9}", text)]
    rank, world_size, local_rank = (0, 1, 0) if wrong else map(int, texts.values())
    if not 0 <= rank < world_size:
        wrong.append(f"RANK={rank} with WORLD_SIZE={world_size}")
    port = os.environ.get("MASTER_PORT", "")
    if world_size > 1:
        wrong += [f"no {name} beside WORLD_SIZE" for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and port and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        wrong.append(f"MASTER_PORT={port!r}")
    if wrong:
        raise ConfigError(
            [
                f"environment: {', '.join(wrong)}; expected RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as "
                "torchrun sets them, or none of them for one process. Start with torchrun, or unset them."
            ]
        )
    return rank, world_size, local_rank


MIN_OPEN_FILES = 256
"""One process opens about 100, most of them for gloo's groups."""


def allow_open_files() -> None:
    """Raises the limit of open files to what this process may have.

    Raises:
        ConfigError: that is fewer than a run opens.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < MIN_OPEN_FILES:
        raise ConfigError(
            [f"at most {most} open files are allowed; expected {MIN_OPEN_FILES} or more. Allow more: ulimit -n 4096."]
        )


SCRIPT_VARIABLES = re.compile(
    "TP|PP|CP|EP|ETP|DP|HF_MODEL_CKPT|TOKENIZER_MODEL|DATASET|LAUNCH_SCRIPT|PYTHON|SANDBOX_[A-Z_]+|MLM_([A-Z]+_ARGS|MODEL_CKPT"
    "|MODEL_SAVE|WORK_DIR|ENV_SETUP)"
)
"""That the user may have set for one of the scripts (conf/arguments.sh)."""


@dataclass(frozen=True)
class Started:
    """How this run was started, to say how to go on with its results."""

    script: str
    """finetune.sh as it was called; empty: Python was."""
    variables: Mapping[str, str]
    """Of SCRIPT_VARIABLES, as the user set them."""
    python: str
    program: tuple[str, ...]
    """What Python runs: finetune.py, or -m megatron_sft finetune."""
    arguments: tuple[str, ...]
    """Of the script, or of the program."""
    path: Mapping[str, str]
    """PYTHONPATH, where -m megatron_sft needs one."""
    machines: int


def started() -> Started:
    """How this run was started: by a script, which says so in MLM_SCRIPT and MLM_ARGUMENTS, or by hand."""
    script, root = os.environ.get("MLM_SCRIPT", ""), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    is_module = os.path.basename(sys.argv[0]) in ("__main__.py", "megatron-sft")
    program = ("-m", "megatron_sft", *sys.argv[1:2]) if is_module else (sys.argv[0],)
    try:
        here = os.getcwd()
    except FileNotFoundError:  # somebody removed it meanwhile
        here = ""
    is_found = root == here or root.endswith("site-packages") or root in os.environ.get("PYTHONPATH", "").split(":")
    known = {name: value for name, value in sorted(os.environ.items()) if SCRIPT_VARIABLES.fullmatch(name)}
    return Started(
        script=script,
        variables={name: value.replace("\\\n", " ") for name, value in known.items()} if script else {},
        python=sys.orig_argv[0],
        program=program,
        arguments=tuple(shlex.split(os.environ.get("MLM_ARGUMENTS", "")) if script else sys.argv[1 + is_module :]),
        path={} if is_found else {"PYTHONPATH": root},
        machines=int(os.environ.get("WORLD_SIZE", "1"))
        // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")),
    )


def wants_colour(stream: TextIO) -> bool:
    """Whether text goes to a terminal that shows colours, whose user has not said NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def be_patient_launcher() -> None:
    """Gives the processes of torchrun a day to save after SIGTERM or Ctrl-C, where it gives 30 s.

    torch/distributed/launcher/api.py (2.12 and later; 2.11 has no such setting). Call it in the launcher, before it starts.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "86400")
