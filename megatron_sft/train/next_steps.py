"""What a person can do with a run's results: the commands that go on, generate, export and report, as this run was started.

A run of finetune.sh is told in the scripts and their variables, any other in this project's Python commands.
Not here: writing the results (saving.py).
"""

import os
import shlex
from collections.abc import Mapping, Sequence

from megatron_sft.config.run import RunConfig
from megatron_sft.environment import Started, process_environment, started
from megatron_sft.train.state import TrainState

SIZES = {
    "--tensor-model-parallel-size": "tensor_model_parallel_size",
    "--pipeline-model-parallel-size": "pipeline_model_parallel_size",
    "--expert-model-parallel-size": "expert_model_parallel_size",
    "--expert-tensor-parallel-size": "expert_tensor_parallel_size",
}
MODEL_VARIABLES = ("TP", "PP", "EP", "ETP", "HF_MODEL_CKPT", "TOKENIZER_MODEL", "PYTHON")
"""Of a script, beside SANDBOX_* and MLM_ENV_SETUP: what the scripts for the trained model need too."""


def next_steps(run: RunConfig, state: TrainState, total: int, stopped: bool) -> str:
    """Where the results are, and a command a line.

    Args:
        run: its `checkpoint` says where results went.
        state: the last one.
        total: iterations of the whole run.
        stopped: before its end.
    """
    how = f"stopped after iteration {state.iteration} of {total}" if stopped else f"trained to the end, {total} iterations"
    if state.iteration < total and not stopped:
        how = f"ended after iteration {state.iteration} of {total} (--early-stop-patience)"
    if not run.checkpoint.save and not run.checkpoint.save_hf:
        return f"{how}. Nothing is kept: there is no --save and no --save-hf."
    places = [f"checkpoints in {run.checkpoint.save}"] if run.checkpoint.save else []
    if run.checkpoint.save_hf and not stopped:
        places.append(f"HF folder {run.checkpoint.save_hf}")
    shown = {name: text for name, text in commands(run, started()).items() if stopped or name != "go on"}
    if run.checkpoint.save:
        shown["report"] = _line(started().path, [started().python, "-m", "megatron_sft", "report", run.checkpoint.save])
    width = max(map(len, shown))
    return "\n".join([f"{how}: {', '.join(places)}", *(f"  {name.ljust(width)}  {text}" for name, text in shown.items())])


def commands(run: RunConfig, how: Started) -> dict[str, str]:
    """{what it does: command line}, to be typed where this run was started."""
    if not run.checkpoint.save:
        return {"generate": _python(run, how, "generate", ["--load", str(run.checkpoint.save_hf)])}
    if how.script:
        return _of_scripts(run, how)
    save = run.checkpoint.save
    precision = ["--bf16"] if run.train.params_dtype == "bf16" else []
    like = ["--tokenizer-model", run.data.tokenizer_model]
    return {
        "go on": _again(how),
        "generate": _python(run, how, "generate", ["--load", save, *precision]),
        "export": _python(run, how, "export", ["--load", save, *like, "--save-hf", _beside(save)]),
    }


def _of_scripts(run: RunConfig, how: Started) -> dict[str, str]:
    folder, conf = os.path.dirname(how.script), how.arguments[:1]
    model = {name: value for name, value in how.variables.items() if name in MODEL_VARIABLES or name.startswith("SANDBOX_")}
    model |= {name: how.variables[name] for name in ("MLM_ENV_SETUP",) if name in how.variables}
    model["MLM_MODEL_CKPT"] = str(run.checkpoint.save)
    template = {"MLM_EXTRA_ARGS": shlex.join(["--chat-template", run.data.chat_template])} if run.data.chat_template else {}
    return {
        "go on": started_by(how),
        "generate": _line(model | template, [os.path.join(folder, "generate.sh"), *conf]),
        "export": _line(model | {"EXPORT_DIR": _beside(str(run.checkpoint.save))}, [os.path.join(folder, "export.sh"), *conf]),
    }


def _beside(save: str) -> str:
    return f"{save.rstrip('/')}_hf"


def _line(variables: Mapping[str, str], words: Sequence[str]) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(words)])


def _again(how: Started) -> str:
    return "the same command, on every machine" if how.machines > 1 else started_by(how)


def started_by(how: Started) -> str:
    """The command that a run was started by; on several machines, where a launcher said more, what each process runs."""
    if how.script:
        return _line(how.variables, [how.script, *how.arguments])
    launcher = _launcher(how, process_environment()[1] if how.machines == 1 else 1)
    return shlex.join([*launcher, *how.program, *how.arguments])


def _launcher(how: Started, ranks: int) -> list[str]:
    return ["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else [how.python]


def _python(run: RunConfig, how: Started, command: str, flags: Sequence[str]) -> str:
    """`python -m megatron_sft command`, with as many ranks as the model needs."""
    sizes = {flag: getattr(run.parallel, name) for flag, name in SIZES.items()}
    tp, pp, ep, etp = sizes.values()
    ranks = pp * (etp * ep if ep > 1 else tp)
    if ep == 1:
        del sizes["--expert-tensor-parallel-size"]
    cut = [word for flag, size in sizes.items() if size > 1 for word in (flag, str(size))]
    return _line(how.path, [*_launcher(how, ranks), "-m", "megatron_sft", command, *flags, *cut])
