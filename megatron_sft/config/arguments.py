"""Flags -> RunConfig. The only module that knows how flags are spelled; imports no torch, so that it is quick.

A flag has one of three outcomes: it sets a field of run.py, it is a known flag without effect here (flags.NO_EFFECT,
a printed line a reason), or it is an error. All problems are reported at once.

    --x-y VALUE      field x_y of a dataclass in run.py, or a setting of megatron-core that has an effect (core_fields.py)
    --no-x-y         sets a boolean field to False
    the rest         flags.SWITCHES, flags.SPELLINGS, and the functions of derived_flags.py

What a value may be stands with the field (fields.py), what fields may be together in problems.py.
"""

import ast
import dataclasses
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from megatron_sft.config import flags
from megatron_sft.config.core_fields import RECORDS, CoreArchitecture, CoreTraining
from megatron_sft.config.derived_flags import DERIVED, Values, integers
from megatron_sft.config.elsewhere import ELSEWHERE
from megatron_sft.config.fields import Kind, Words, flag_of, kinds
from megatron_sft.config.folders import checkpoint_place
from megatron_sft.config.hints import hint, nearest
from megatron_sft.config.options import DoctorConfig, PlanConfig, ReportConfig, ViewConfig
from megatron_sft.config.problems import data_problems, idle_problems, problems
from megatron_sft.config.run import ParallelConfig, RunConfig
from megatron_sft.errors import ConfigError
from megatron_sft.log import logger

SECTIONS = {field.name: type(getattr(RunConfig(), field.name)) for field in dataclasses.fields(RunConfig)}
LENGTHS = ("train.train_iters", "train.train_samples", "train.num_epoch")
NO_FLAG = frozenset("moe mla mamba core rope_scaling window_size window_layers split train_data train_names loss_type".split())
"""Fields that have no flag of their name."""
Options = TypeVar("Options")


@dataclass(frozen=True)
class Flag:
    """One flag and what it does."""

    name: str
    path: str = ""
    """The field that it sets, "train.lr"; "" for the flags of derived_flags.py, and those that do nothing."""
    kind: Kind = Kind(bool)
    sets: tuple[tuple[str, Any], ...] = ()
    """Fields and their values, of a flag that takes none."""
    words: int | str = 1
    """Values that it takes: 0, 1, or "+" for at least one."""
    help: str = ""
    hidden: bool = False
    """Not in --help."""
    described: type | None = None
    """The class of options.py whose field it is."""


@dataclass(frozen=True)
class Given:
    """A flag of the command line."""

    flag: Flag
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.flag.name, *self.words])


@overload
def parse(argv: Sequence[str], world_size: int, training: bool = True) -> tuple[RunConfig, frozenset[str]]: ...
@overload
def parse(
    argv: Sequence[str], world_size: int, training: bool = True, *, options: type[Options]
) -> tuple[RunConfig, frozenset[str], Options]: ...
def parse(argv: Sequence[str], world_size: int, training: bool = True, *, options: Any = None) -> Any:
    """Reads the flags of a training run, or of another command.

    Args:
        argv: without the program's name.
        world_size: processes, for checks of the layout.
        training: False leaves out what only training needs (data, lengths, schedules).
        options: dataclass of run.py with the flags that the command has beside a run's; it decides what is checked.

    Returns:
        The run, and the names of its fields that a flag set (a checkpoint says the others). With `options` also those.

    Raises:
        ConfigError: every unknown flag, wrong value and contradiction, at once.
    """
    values, sentences = read_flags(argv, options)
    own = {path.removeprefix("own."): value for path, value in values.items() if path.startswith("own.")}
    run = _run({path: value for path, value in values.items() if not path.startswith("own.")})
    wrong = [sentence.split()[0].rstrip(":") for sentence in sentences]
    if options in (ViewConfig, ReportConfig):
        together = data_problems(run.data)
    elif options is PlanConfig:  # whatever the layout and the data
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, train_data=("any",), tokenizer_model="any"))
        together = problems(dataclasses.replace(run, parallel=ParallelConfig()), 1)
    else:
        together = problems(run, world_size, training and options in (None, DoctorConfig))
    explicit = frozenset(path.split(".")[1] for path in values)
    together += idle_problems(run.model, explicit - run.model.core_fields().keys())
    # What contradicts a flag whose own value is wrong may vanish with it.
    sentences += [sentence for sentence in together if not any(re.search(rf"{re.escape(name)}\b", sentence) for name in wrong)]
    if sentences:
        raise ConfigError(sentences)
    return (run, explicit) if options is None else (run, explicit, options(**own))


def read_flags(argv: Sequence[str], options: type | None = None) -> tuple[Values, list[str]]:
    """Command line -> (field values, problems).

    Args:
        argv: without the program's name.
        options: dataclass of run.py whose fields are flags too; their paths start with "own.".
    """
    table = flag_table(options)
    given, problems = split_flags(argv, table)
    values: Values = {}
    said: dict[str, Given] = {}
    _say_idle([item.flag.name for item in given])
    for item in _last_length_wins(given, problems):
        values |= dict(item.flag.sets)
        if item.flag.path and not item.flag.sets:
            _take(item, values, said, problems)
    raw = {item.flag.name: item.words[0] if item.flag.words == 1 else list(item.words) for item in given}
    for name, derived in DERIVED.items():
        if name in raw and derived.read:
            derived.read(raw, values, problems)
    return values, problems


def _say_idle(names: Sequence[str]) -> None:
    """A line for each reason why flags have no effect: confs have half a dozen of them."""
    idle: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for name in names if name in flags.NO_EFFECT):
        idle.setdefault(flags.NO_EFFECT[name][1], []).append(name)
    for why, group in idle.items():
        logger.info("%s %s no effect: %s.", ", ".join(group), "has" if len(group) == 1 else "have", why)


def split_flags(argv: Sequence[str], table: Mapping[str, Flag]) -> tuple[list[Given], list[str]]:
    """(flags with their words, in the order of the command line; problems)."""
    given: list[Given] = []
    problems: list[str] = []
    words = list(argv)
    while words:
        name, has_value, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            problems.append(f"{name}: unknown value; no flag takes it. {ELSEWHERE.get(name.lstrip('+'), 'See --help.')}")
            continue
        following = [value] if has_value else _following(words)
        known = table.get(name)
        if known is None:
            problems.append(hint(name, list(table)))
            del words[: 0 if has_value else len(following)]  # the value of an unknown flag is no problem of its own
        elif has_value and known.words == 0:
            problems.append(f"{name}={value}: expected no value. Write {name} alone.")
        elif known.words != 0 and not following:
            problems.append(f"{name}: expected a value after it. Add one, or leave the flag out.")
        else:
            taken = following if known.words == "+" else following[: int(known.words)]
            del words[: 0 if has_value else len(taken)]
            given.append(Given(known, tuple(taken)))
    return given, problems


def _following(words: Sequence[str]) -> list[str]:
    """The words before the next flag; -1 and -inf are numbers."""
    taken: list[str] = []
    for word in words:
        if word.startswith("--"):
            break
        taken.append(word)
    return taken


MAY_BE_EMPTY = ("own.prompt", "own.stop")
"""What is wrong with an empty text of theirs, their commands say. Megatron-LM's scripts pass empty names of experiments."""


def _take(given: Given, values: Values, said: dict[str, Given], problems: list[str]) -> None:
    """Puts the value of a flag in `values`, or a sentence in `found`."""
    kind, path = given.flag.kind, given.flag.path
    if "" in given.words and kind.base is str and path not in MAY_BE_EMPTY and not path.startswith("log."):
        expected = "expected a value; perhaps a variable is not set. Give one, or leave the flag out"
        problems.append(f"{given.flag.name} '': {expected}.")
        return
    try:
        value = kind.read(given.words, integers)
        is_right = kind.has(value)
    except (ValueError, OverflowError):
        is_right = False
    if not is_right:
        near = nearest(given.words[0], kind.rule.words) if isinstance(kind.rule, Words) else ""
        problems.append(f"{given}: expected {kind.expected()}.{f' Did you mean {near}?' if near else ' Correct it.'}")
        return
    if path in ("own.prompt", "own.stop"):
        value = (*values.get(path, ()), *value)
    before = said.get(path)
    if before and before.flag.name != given.flag.name and values.get(path) != value:
        if path in flags.NOT_THE_SAME:
            problems.append(f"{before}, {given}: {flags.NOT_THE_SAME[path]}")
        else:
            logger.info("%s has no effect: %s comes later.", before, given)
    values[path], said[path] = value, given


def _last_length_wins(given: Sequence[Given], problems: list[str]) -> Iterator[Given]:
    """Of --train-iters, --train-samples and --num-epoch the last one counts, with schedule lengths of its own unit.

    finetune.sh gives --train-samples by default, so that a user's --num-epoch in MLM_EXTRA_ARGS has to win.
    """
    places = [index for index, item in enumerate(given) if item.flag.path in LENGTHS]
    last = places[-1] if places else -1
    winner = given[last].flag.path if places else ""
    other_unit = "iters" if winner == "train.train_samples" else "samples"
    for index, item in enumerate(given):
        loses = item.flag.path in LENGTHS and item.flag.path != winner
        stale = index < last and item.flag.path in (f"optim.lr_decay_{other_unit}", f"optim.lr_warmup_{other_unit}")
        if loses or stale:
            logger.info("%s has no effect: %s comes later.", item, given[last].flag.name)
        else:
            yield item


@functools.cache
def flag_table(options: type | None = None) -> dict[str, Flag]:
    """{name: flag}, in an order that --help keeps.

    Args:
        options: as read_flags.
    """
    fields = [flag for part in (*RECORDS.values(), CoreArchitecture, CoreTraining) for flag in _field_flags("core", part)]
    fields += [item for name, section in SECTIONS.items() for item in _field_flags(name, section)]
    fields += [dataclasses.replace(item, described=options) for item in _field_flags("own", options)] if options else []
    by_path = {item.path: item for item in fields}
    spelled = [
        dataclasses.replace(by_path[path], name=name, help=f"the same as {by_path[path].name}")
        for name, path in flags.SPELLINGS.items()
        if path in by_path
    ]
    switches = [Flag(name, sets=sets, words=0, help=_switch_help(sets)) for name, sets in flags.SWITCHES.items()]
    idle = [Flag(name, words=words, help=f"no effect: {why}") for name, (words, why) in flags.NO_EFFECT.items()]
    derived = [Flag(name, words=item.words, help=item.help) for name, item in DERIVED.items() if item.help]
    off = [
        dataclasses.replace(item, name="--no-" + item.name[2:], sets=((item.path, False),), hidden=True)
        for item in fields
        if item.kind.base is bool
    ]
    return {item.name: item for item in [*off, *fields, *spelled, *switches, *idle, *derived]}


def spelled(name: str) -> str:
    """The flags that say a field of ModelConfig, for messages: num_moe_experts -> --num-moe-experts or --num-experts."""
    return " or ".join(item.name for item in flag_table().values() if _says(item, name) and not item.hidden)


def _says(item: Flag, name: str) -> bool:
    derived = DERIVED.get(item.name)
    paths = {item.path, derived.sets if derived else "", *(path for path, _ in item.sets)}
    return bool(paths & {f"model.{name}", f"core.{name}"})


def _field_flags(section: str, described: type) -> Iterator[Flag]:
    """A flag for each field of a class, with the text under it as its help."""
    texts = _texts(described)
    for name, kind in kinds(described).items():
        path = f"{section}.{name}"
        if kind.base is bool:
            yield Flag(flag_of(name), path, kind, ((path, True),), 0, texts.get(name, ""))
        elif name not in NO_FLAG:
            yield Flag(flag_of(name), path, kind, words=1 if kind.shape == "one" else "+", help=texts.get(name, ""))


@functools.cache
def _statements(module: str) -> list[ast.stmt]:
    """Of a module's source, parsed once: inspect.getsource parses the whole module again for each class."""
    return ast.parse(inspect.getsource(sys.modules[module])).body


def _texts(described: type) -> dict[str, str]:
    """{field: the docstring under it} of a class, read from its source."""
    statements = _statements(described.__module__)
    tree = next(item for item in statements if isinstance(item, ast.ClassDef) and item.name == described.__name__)
    texts = {}
    for item, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[ast.unparse(item.target)] = str(after.value.value)
    return texts


def _switch_help(sets: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{path.split('.')[1]} = {value}" for path, value in sets) or (
        "another flag says it; accepted because every conf has it"
    )


def _run(values: Values) -> RunConfig:
    """The RunConfig of the given values; one epoch where no length is given."""
    if not any(path in values for path in LENGTHS):
        values = {**values, "train.num_epoch": 1.0}
    if "data.seed" not in values and "train.seed" in values:
        values = {**values, "data.seed": values["train.seed"]}
    sections: dict[str, Values] = {name: {} for name in SECTIONS}
    core: Values = {}
    for path, value in values.items():
        section, name = path.split(".", 1)
        (core if section == "core" else sections[section])[name] = value
    tensor_size = sections["parallel"].get("tensor_model_parallel_size", 1)
    sections["parallel"].setdefault("expert_tensor_parallel_size", tensor_size)  # Megatron-LM's default
    if tensor_size == 1 and sections["parallel"].pop("sequence_parallel", False):  # every conf with experts asks for it
        logger.info("--sequence-parallel has no effect: --tensor-model-parallel-size is 1.")
    _one_checkpoint(sections["checkpoint"])
    if "tokenizer_model" not in sections["data"] and sections["checkpoint"].get("load"):
        sections["data"]["tokenizer_model"] = sections["checkpoint"]["load"]
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # XDG Base Directory Specification 0.8: any other value is to be ignored
        sections["data"].setdefault("data_cache_path", os.path.join(cache, "megatron_sft"))
    run = RunConfig(**{name: SECTIONS[name](**given) for name, given in sections.items()})
    return dataclasses.replace(run, model=run.model.with_core(core))


def _one_checkpoint(places: Values) -> None:
    """--load out/iter_0000040 is --load out --ckpt-step 40."""
    if not places.get("load"):
        return
    load, iteration = checkpoint_place(places["load"])
    if iteration is not None and places.setdefault("ckpt_step", iteration) != iteration:
        said = f"--ckpt-step {places['ckpt_step']} and --load {places['load']}"
        raise ConfigError([f"{said} name two checkpoints; expected one. Leave --ckpt-step out."])
    places["load"] = load
