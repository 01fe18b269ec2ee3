"""Groups of parameters with a learning rate, weight decay and optimizer of their own: the table that flags say. No torch.

    --param-groups "embedding lr=1e-5 weight_decay=0" "router lr=1e-6 min_lr=1e-7"

A word of the flag is a regular expression, found anywhere in a parameter's name (`decoder.layers.3.mlp.linear_fc1.weight`, layers
counted over the whole model), and what is set for it. The first entry that matches counts; --embedding-lr, --unembedding-lr and
--matrix-lr come after the table. Not here: which parameters there are (train/groups.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sft.config.fields import flag_of, kinds, shown
from megatron_sft.config.optim import OptimConfig

SETTINGS = {"lr": "lr", "min_lr": "min_lr", "weight_decay": "weight_decay", "optimizer": "optimizer"}
"""What an entry may set -> the field of OptimConfig whose values it may have."""
OWN_RATES = ("embedding_lr", "unembedding_lr", "matrix_lr")


@dataclass(frozen=True)
class ParameterGroup:
    """One entry, with what it leaves open taken from the run's own settings."""

    label: str
    """In the log: lr/LABEL."""
    pattern: str
    """Regular expression for names; "" for a group of a kind (embedding, unembedding, matrix, other)."""
    lr: float
    min_lr: float
    weight_decay: float
    optimizer: str
    decays_all: bool
    """Its weight decay was asked for: it counts for norms and biases too."""


def parsed(entry: str) -> tuple[str, dict[str, float | str]]:
    """("PATTERN", {setting: value}) of one entry. Raises ValueError with what is wrong."""
    pattern, *words = entry.split()
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern} is no regular expression ({error})") from None
    settings: dict[str, float | str] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in SETTINGS:
            raise ValueError(f"{word}: expected one of {', '.join(f'{known}=VALUE' for known in SETTINGS)}")
        kind = kinds(OptimConfig)[SETTINGS[name]]
        try:
            value = kind.read([text])
        except ValueError:
            value = None
        if value is None or not kind.has(value):
            raise ValueError(f"{word}: expected {kind.expected()}")
        settings[name] = value
    if not settings:
        raise ValueError("nothing is set for it")
    return pattern, settings


def parameter_groups(optim: OptimConfig) -> list[ParameterGroup]:
    """The table and the flags behind it, in the order in which they are tried; "other" is the last and takes the rest.

    A group without a min_lr of its own ends at the same share of its lr as the run does.
    """
    groups = []
    for entry in optim.param_groups:
        pattern, own = parsed(entry)
        groups.append(_group(optim, pattern, pattern, own))
    for name in OWN_RATES:
        rate, label = getattr(optim, name), name.removesuffix("_lr")
        if rate is not None or (label == "matrix" and optim.optimizer == "muon"):
            own = {} if rate is None else {"lr": rate}
            groups.append(_group(optim, label, "", own))
    rest = "adam" if optim.optimizer == "muon" else optim.optimizer
    return [*groups, _group(optim, "other", "", {"optimizer": rest})] if groups or rest != "adam" else []


def _group(optim: OptimConfig, label: str, pattern: str, own: dict[str, float | str]) -> ParameterGroup:
    peak = float(own.get("lr", optim.lr))
    least = lowest_rate(optim, peak)
    return ParameterGroup(
        label,
        pattern,
        peak * optim.init_lr_frac,
        float(own["min_lr"]) if "min_lr" in own else least,
        float(own.get("weight_decay", optim.weight_decay)),
        str(own.get("optimizer", optim.optimizer)),
        "weight_decay" in own,
    )


def mixes_optimizers(optim: OptimConfig) -> bool:
    """Whether an entry of the table has another optimizer than the run: layers can then differ in the states that they have."""
    return any(g.pattern and g.optimizer != optim.optimizer for g in parameter_groups(optim))


def optimizers_of(entries: Sequence[str]) -> list[list[str]]:
    """[PATTERN, optimizer=WORD] of each entry up to the last that says one: tables that agree in it give the same states.

    Example: ["a lr=1", "b optimizer=sgd lr=1", "c lr=1"] -> [["a"], ["b", "optimizer=sgd"]].
    """
    groups = [
        [word for number, word in enumerate(entry.split()) if not number or word.startswith("optimizer=")] for entry in entries
    ]
    while groups and len(groups[-1]) < 2:
        groups.pop()
    return groups


def lowest_rate(optim: OptimConfig, peak: float) -> float:
    """Where the schedule of a group with this lr ends: --final-lr-frac of its highest rate, else as --min-lr is to --lr."""
    if optim.final_lr_frac is not None:
        return peak * optim.init_lr_frac * optim.final_lr_frac
    return optim.min_lr * (peak / optim.lr) if optim.lr else optim.min_lr


def group_problems(optim: OptimConfig) -> list[str]:
    """What is wrong with the table, one sentence each."""
    problems = []
    for entry in optim.param_groups:
        try:
            if not entry.split():
                raise ValueError("it is empty")
            parsed(entry)
        except ValueError as error:
            example = '"embedding lr=1e-5 weight_decay=0"'
            problems.append(f"--param-groups {entry!r}: {error}. Expected a pattern and settings such as {example}. Correct it.")
    if problems:
        return problems
    groups = parameter_groups(optim)
    used = {group.optimizer for group in groups}
    for name, optimizer in (("sgd_momentum", "sgd"), ("muon_variant", "muon"), ("muon_momentum", "muon")):
        value = getattr(optim, name)
        if value != getattr(OptimConfig(), name) and optimizer not in used:
            problems.append(
                f"{flag_of(name)} {shown(value)} has no effect without --optimizer {optimizer}. Add it, or leave it out."
            )
    if optim.muon_variant == "nanochat" and optim.muon_momentum != OptimConfig().muon_momentum:
        problems.append("--muon-momentum has no effect with --muon-variant nanochat, whose momentum rises. Leave it out.")
    for group in groups:
        if group.min_lr > group.lr:
            problems.append(
                f"the rate of group {group.label} would rise from {shown(group.lr)} to {shown(group.min_lr)}. Lower --min-lr or "
                "the group's min_lr, or raise its lr."
            )
        if optim.lr_warmup_init > group.lr:
            problems.append(
                f"--lr-warmup-init {optim.lr_warmup_init:g} is above the rate of group {group.label}, {group.lr:g}. Lower it."
            )
    return problems
