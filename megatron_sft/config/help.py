"""What --help, --help-all and --help-json print, of every command, made of the flag table: no flag is described twice.

--help has the flags that a person needs first, then those that have an effect on the command, by group; --help-all also
megatron-core's settings, other spellings and flags without effect; --help-json all of it, for programs.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_sft.config import flags
from megatron_sft.config.arguments import Flag, flag_table
from megatron_sft.config.derived_flags import DERIVED
from megatron_sft.config.fields import Words, shown
from megatron_sft.config.hints import nearest
from megatron_sft.config.options import COMMANDS, FIRST, GROUPS, Command
from megatron_sft.config.run import RunConfig

ASKS = ("--help", "--help-all", "--help-json")
OWN, CORE, NAMES, IDLE = "own", "core", "names", "idle"
TITLES: Mapping[str, str] = {
    OWN: "this command",
    **GROUPS,
    CORE: "megatron-core's settings",
    NAMES: "other spellings",
    IDLE: "accepted without effect here",
}
"""Group -> its title, in the order of --help-all."""
ARCHITECTURE = "the checkpoint's"
"""Default of what belongs to the weights."""
RARE = frozenset(
    "--mlflow-run-name --mlflow-tracking-uri --trackio-name --trackio-group --swanlab-exp-name --swanlab-mode --sgd-momentum "
    "--muon-variant --muon-momentum --init-lr-frac --warmdown-ratio --final-lr-frac --matrix-lr --embedding-lr --unembedding-lr "
    "--decoupled-lr --decoupled-min-lr --optimizer-offload-fraction --distributed-backend --distributed-timeout-minutes "
    "--kernels --attention-backend".split()
)
"""Of places, kernels, optimizers, schedules and connections: in --help-all, so that --help stays under 200 flags."""
WIDTH, COLUMN = 118, 38


def help_of(name: str, argv: Sequence[str]) -> str:
    """The help that a command line asks for; "" where it asks for none.

    Args:
        name: of a command in options.COMMANDS.
        argv: its words.
    """
    asked = "--help" if "-h" in (*argv[:1], *argv[-1:]) else ""
    asked = next((word for word in reversed(ASKS) if word in argv), asked)
    if not asked:
        return ""
    command = COMMANDS[name]
    if asked == "--help-json":
        listed = [entry(flag) for flag in shown_flags(command, is_all=True)]
        return json.dumps({"command": name, **_said(command), "flags": listed}, indent=1)
    return _page(name, command, asked == "--help-all")


def overview(name: str | None, argv: Sequence[str]) -> str:
    """What `megatron-sft` itself says: of all commands, or of one that is none."""
    if "--help-json" in argv:
        return json.dumps({name: _said(command) for name, command in COMMANDS.items()}, indent=1)
    lines = ["usage: megatron-sft COMMAND [flags]", ""]
    lines += [f"  {name:10} {command.does}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "megatron-sft COMMAND --help shows its flags; CONF is a model such as Qwen/Qwen3-0.6B, a .sh file or an HF folder.",
    ]
    if name:
        near = nearest(name, list(COMMANDS))
        lines.insert(0, f"megatron-sft {name}: no such command. {f'Did you mean {near}?' if near else 'Expected one of these.'}")
    return "\n".join(lines)


def shown_flags(command: Command, is_all: bool) -> list[Flag]:
    """The flags of a command, with those of --help-all or without. What turns off what is on is not a flag of its own here."""
    listed = []
    for flag in flag_table(command.options).values():
        group = group_of(flag)
        counts = group == OWN or group in command.groups or flag.name in command.flags
        idle = group in (CORE, NAMES, IDLE, "model") and bool(command.groups)
        if not flag.hidden and (counts or (is_all and idle)) and (is_all or not _is_rare(flag)):
            listed.append(flag)
    return listed


def divided(argv: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """A command line of our flags and of another program's, as (ours, theirs).

    Args:
        argv: its words; those behind a flag go with it.
        name: of the command, whose --help-all has our flags.

    Example: --bf16 --tasks a b --ckpt-step 4 -> ([--bf16, --ckpt-step, 4], [--tasks, a, b])
    """
    known = {flag.name for flag in shown_flags(COMMANDS[name], is_all=True)}
    parts: tuple[list[str], list[str]] = [], []
    part = parts[1]
    for word in argv:
        if word.startswith("-"):
            part = parts[word.partition("=")[0] not in known]
        part.append(word)
    return parts


def group_of(flag: Flag) -> str:
    """The section of run.py that its field stands in; NAMES and IDLE for what is a flag for the sake of others."""
    if flag.name in flags.NO_EFFECT or (flag.name in flags.SWITCHES and not flag.sets):
        return IDLE
    if flag.name in flags.SPELLINGS:
        return NAMES
    paths = [flag.path, *(path for path, _ in flag.sets)]
    path = next(filter(None, paths), "")
    return path.partition(".")[0] or DERIVED[flag.name].group


def _is_rare(flag: Flag) -> bool:
    """Not in --help: settings of a conf, what other flags say too, and what few use."""
    return (
        group_of(flag) in (CORE, NAMES, IDLE)
        or flag.name in RARE
        or (flag.name in flags.SWITCHES and flag.name not in ("--bf16", "--fp32"))
    )


def default_of(flag: Flag) -> str:
    """As --help shows it: 4096, on, none."""
    group = group_of(flag)
    if flag.name in DERIVED and DERIVED[flag.name].help:
        return DERIVED[flag.name].default
    if flag.name in flags.SWITCHES or group in (NAMES, IDLE):
        return ""
    if group in (CORE, "model"):
        return ARCHITECTURE
    section, _, name = flag.path.partition(".")
    described: Any = flag.described if section == OWN else type(getattr(RunConfig(), section))
    value = next(field.default for field in dataclasses.fields(described) if field.name == name)
    if value is dataclasses.MISSING or value is None or value in ((), ""):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(shown, value)) if isinstance(value, tuple) else shown(value)


def unit_of(flag: Flag) -> str:
    """What its value counts or names: TOKENS, FILE; else its words, or what kind of value it is."""
    if not flag.words:
        return ""
    if isinstance(flag.kind.rule, Words) and not flag.kind.unit:
        return "|".join(flag.kind.rule.words)
    said = flag.kind.unit or (DERIVED[flag.name].unit if flag.name in DERIVED else "")
    if flag.name in flags.NO_EFFECT or flag.kind.base is bool:
        return said.upper() or "VALUE"
    kinds: dict[Any, str] = {int: "NUMBER", float: "NUMBER", str: "TEXT"}
    return said.upper() or ("NAME=VALUE" if flag.kind.shape == "pairs" else kinds.get(flag.kind.base, "VALUE"))


def entry(flag: Flag) -> dict[str, Any]:
    """A flag for programs."""
    return {
        "flag": flag.name,
        "group": TITLES[group_of(flag)],
        "first": flag.name in FIRST,
        "values": flag.words,
        "unit": unit_of(flag),
        "expected": flag.kind.expected() if flag.words and flag.path else "",
        "default": default_of(flag),
        "help": flag.help,
    }


def _said(command: Command) -> dict[str, Any]:
    return {"does": command.does, "place": command.place, "examples": list(command.examples)}


def _page(name: str, command: Command, is_all: bool) -> str:
    listed = shown_flags(command, is_all)
    words = " ".join(filter(None, ["usage: megatron-sft", name, command.place, "[flags]" if listed else ""]))
    out = [words, "", command.does]
    if listed:
        out.append("A flag stands with its unit, and with its default in brackets; --[no-]x can be turned on and off.")
    first = [flag for wanted in FIRST for flag in listed if flag.name == wanted]
    own = [flag for flag in listed if group_of(flag) == OWN]
    if own and first:
        out += _section(TITLES[OWN], own)
    out += _section("first of all", first)
    for group, title in TITLES.items():
        out += _section(title, [f for f in listed if group_of(f) == group and f not in first and not (first and f in own)])
    out += ["", "examples", *(f"  {example}" for example in command.examples)]
    if not is_all and len(shown_flags(command, True)) > len(listed):
        out += ["", "--help-all adds megatron-core's settings and other spellings; --help-json is for programs."]
    return "\n".join(out)


def _section(title: str, listed: Sequence[Flag]) -> Iterator[str]:
    if not listed:
        return
    yield from ("", title)
    for flag in listed:
        default = default_of(flag)
        name = flag.name.replace("--", "--[no-]", 1) if default == "on" else flag.name
        head = f"  {name} {unit_of(flag)}{' ...' if flag.words == '+' else ''}".rstrip()
        text = f"{flag.help} {f'[{default}]' if default else ''}".strip()
        if len(head) >= COLUMN:
            yield head
            head = ""
        yield from textwrap.wrap(text, WIDTH, initial_indent=f"{head:{COLUMN}}", subsequent_indent=" " * COLUMN)
