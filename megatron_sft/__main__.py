"""The command line beside training: `megatron-sft COMMAND [flags]`, or `python -m megatron_sft COMMAND [flags]`.

Flags are a training run's, read by arguments.py. Not here: what a command does; each is one function elsewhere.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

from megatron_sft import log
from megatron_sft.arguments import parse, parse_generate, parse_mmlu
from megatron_sft.config import RunConfig
from megatron_sft.core_compat import process_environment
from megatron_sft.errors import ConfigError, UserError


def finetune(argv: Sequence[str], world_size: int) -> int:
    """Trains: the flags of finetune.py."""
    run, explicit = parse(argv, world_size)
    from megatron_sft.train.setup import finetune as train

    return train(run, explicit)


def generate(argv: Sequence[str], world_size: int) -> int:
    """Answers prompts into --output FILE.jsonl."""
    run, explicit, options = parse_generate(argv, world_size)
    from megatron_sft.prompts import answer_prompts

    for row in answer_prompts(run, explicit, options):
        print(row["response"])
    return 0


def mmlu(argv: Sequence[str], world_size: int) -> int:
    """Scores MMLU: --load MODEL [--mmlu-dataset FOLDER --fraction F --few-shots N --lower-bound X --output JSON]."""
    run, explicit, options = parse_mmlu(argv, world_size)
    from megatron_sft.tasks.mmlu import mmlu as score

    return score(run, explicit, options)


def convert(argv: Sequence[str], world_size: int) -> int:
    """HF folder -> Megatron checkpoint: --load FOLDER --save ROOT [--bf16 --no-verify-conversion]."""
    run = _model_run(argv, world_size, "load", "save")
    from megatron_sft.conversion import convert as write

    checkpoint = run.checkpoint
    write(str(checkpoint.load), str(checkpoint.save), run.parallel, run.train.params_dtype, checkpoint.verify_conversion)
    return 0


def export(argv: Sequence[str], world_size: int) -> int:
    """Megatron checkpoint -> HF folder: --load ROOT --save-hf FOLDER [--tokenizer-model HF_FOLDER]."""
    run = _model_run(argv, world_size, "load", "save_hf")
    from megatron_sft.conversion import export as write

    own = run.data.tokenizer_model if run.data.tokenizer_model != run.checkpoint.load else None
    write(str(run.checkpoint.load), str(run.checkpoint.save_hf), run.parallel, own)
    return 0


def verify(argv: Sequence[str], world_size: int) -> int:
    """Compares with transformers: --tokenizer-model HF_FOLDER [--load MEGATRON_CHECKPOINT]; exit status 1 if they differ."""
    run = _model_run(argv, world_size)
    folder, checkpoint = run.data.tokenizer_model, run.checkpoint.load
    if not folder:
        raise ConfigError(["--tokenizer-model is missing: expected the HF folder to compare with."])
    from megatron_sft.conversion import verify as same

    return 0 if same(folder, checkpoint if checkpoint != folder else None) else 1


def conf(argv: Sequence[str], world_size: int) -> int:
    """Prints a conf/<org>/<model>.sh for an HF folder: --load FOLDER."""
    run = _model_run(argv, world_size, "load")
    from megatron_sft.conversion import conf as text

    print(text(str(run.checkpoint.load)), end="")
    return 0


def _model_run(argv: Sequence[str], world_size: int, *needed: str) -> RunConfig:
    """The configuration of a command that trains nothing; `needed` fields of its checkpoint section must be given."""
    run = parse(argv, world_size, training=False)[0]
    missing = [f"--{name.replace('_', '-')} is missing: see --help." for name in needed if not getattr(run.checkpoint, name)]
    if missing:
        raise ConfigError(missing)
    return run


COMMANDS: Mapping[str, Callable[[Sequence[str], int], int]] = {
    "finetune": finetune,
    "generate": generate,
    "mmlu": mmlu,
    "convert": convert,
    "export": export,
    "verify": verify,
    "conf": conf,
}


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    rank, world_size, _ = process_environment()
    log.configure(rank)
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        lines = [f"  {name:10} {function.__doc__}" for name, function in COMMANDS.items()]
        print("\n".join(["usage: megatron-sft COMMAND [flags]", *lines]))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        return command(argv[1:], world_size)
    except UserError as error:
        log.logger.error("%s", error)
        return error.exit_status


def run() -> None:
    """Entry point of the installed `megatron-sft` script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
