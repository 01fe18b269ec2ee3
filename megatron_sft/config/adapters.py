"""Contradictions in what is trained: adapters, and parameters that are frozen. A part of problems.py, which gathers them."""

import re

from megatron_sft.config.fields import flag_of, shown
from megatron_sft.config.run import LoraConfig, RunConfig


def trained_problems(run: RunConfig) -> list[str]:
    """What is wrong with the flags that say what is trained, one sentence each."""
    lora, train, problems = run.lora, run.train, []
    idle = [name for name in ("alpha", "dropout", "target_modules", "type", "init") if _differs(lora, f"lora_{name}")]
    if idle and not lora.lora_rank and not lora.lora_load:
        problems.append(f"{flag_of('lora_' + idle[0])} has no effect without --lora-rank. Add it, or leave it out.")
    if lora.lora_type == "dora" and lora.lora_dropout:
        problems.append(f"--lora-dropout {shown(lora.lora_dropout)} with --lora-type dora: expected 0. Leave one of them out.")
    if lora.lora_dropout and run.model.moe.num_moe_experts and run.parallel.expert_tensor_parallel_size > 1:
        problems.append(
            f"--lora-dropout {shown(lora.lora_dropout)} with experts that --expert-tensor-parallel-size cuts: expected 0, or "
            "experts that are whole. Leave the first out, or use 1 (ETP=1)."
        )
    if not lora.lora_target_modules:
        problems.append("--lora-target-modules is empty; expected all-linear or names of modules. Leave it out.")
    given = [name for name in ("freeze", "train_only") if getattr(train, name)]
    if len(given) == 2:
        problems.append("--freeze and --train-only contradict each other. Give one of them.")
    if given and (lora.lora_rank or lora.lora_load):
        problems.append(f"{flag_of(given[0])} with adapters, beside which nothing is trained. Leave one of them out.")
    words = {"--lora-target-modules": lora.lora_target_modules, "--freeze": train.freeze, "--train-only": train.train_only}
    for flag, patterns in words.items():
        faults = {word: text for word in patterns if (text := _fault(word))}
        problems += [f"{flag} {word}: {text}; expected a regular expression. Correct it." for word, text in faults.items()]
    return problems


def _differs(lora: LoraConfig, name: str) -> bool:
    return bool(getattr(lora, name) != getattr(LoraConfig(), name))


def _fault(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""
