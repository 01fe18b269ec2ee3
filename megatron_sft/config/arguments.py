"""Flags -> RunConfig. The only module that knows how flags are spelled; imports no torch, so that --help is quick.

A flag has one of three outcomes: it sets a field of run.py, it is a known flag without effect here (flags.NO_EFFECT,
one printed line), or it is an error with the nearest spelling. All problems are reported at once.

    --x-y VALUE      field x_y of a dataclass in run.py, or of megatron-core's TransformerConfig (ModelConfig.core)
    --no-x-y         sets a boolean field to False
    the rest         flags.SWITCHES, flags.SPELLINGS, and the functions of derived_flags.py
"""

import argparse
import ast
import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_sft.config import flags
from megatron_sft.config import run as config
from megatron_sft.config.derived_flags import DERIVED, DERIVED_HELP, Values, integers
from megatron_sft.config.problems import data_problems, problems
from megatron_sft.config.run import GenerateConfig, MMLUConfig, ParallelConfig, PlanConfig, RunConfig, ViewConfig
from megatron_sft.core_compat import transformer_config_fields
from megatron_sft.errors import ConfigError
from megatron_sft.log import logger

SECTIONS = {field.name: type(getattr(RunConfig(), field.name)) for field in dataclasses.fields(RunConfig)}
LENGTHS = {"--train-iters": "train.train_iters", "--train-samples": "train.train_samples", "--num-epoch": "train.num_epoch"}


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One flag: the field it sets and the annotation that converts its value."""

    name: str
    path: str
    annotation: str
    help: str = ""


def parse(argv: Sequence[str], world_size: int, training: bool = True) -> tuple[RunConfig, frozenset[str]]:
    """Reads the flags of a training run, or of a command that only needs a model.

    Args:
        argv: without the program's name.
        world_size: processes, for checks of the layout.
        training: False leaves out what only training needs (data, lengths, schedules).

    Returns:
        The run, and the names of the ModelConfig fields that a flag set (the checkpoint says the others).

    Raises:
        ConfigError: every unknown flag, wrong value and contradiction, at once.
    """
    values, found = read_flags(argv, [])
    run = _run(values)
    found += problems(run, world_size, training)
    if found:
        raise ConfigError(found)
    return run, _explicit(values)


def parse_generate(argv: Sequence[str], world_size: int) -> tuple[RunConfig, frozenset[str], GenerateConfig]:
    """Reads the flags of generate.py: its own, and a training run's, of which the model's and --load matter."""
    return _parse_with(argv, world_size, GenerateConfig, {"--data": "prompts_path"})


def parse_mmlu(argv: Sequence[str], world_size: int) -> tuple[RunConfig, frozenset[str], MMLUConfig]:
    """Reads the flags of `megatron-sft mmlu`."""
    return _parse_with(argv, world_size, MMLUConfig, {})


def parse_view(argv: Sequence[str], world_size: int) -> tuple[RunConfig, ViewConfig]:
    """Reads the flags of the commands on data alone: prepare, preview and report."""
    run, _, options = _parse_with(argv, world_size, ViewConfig, {})
    if found := data_problems(run.data):
        raise ConfigError(found)
    return run, options


def parse_plan(argv: Sequence[str]) -> tuple[RunConfig, frozenset[str], PlanConfig]:
    """Reads the flags of `megatron-sft plan`: a run's, which needs no data here, and those of PlanConfig.

    Returns:
        The run, the names of the ParallelConfig fields that a flag set, and what is planned for.
    """
    values, found = read_flags(argv, _own_flags(PlanConfig, {}))
    options = PlanConfig(**{path.removeprefix("own."): value for path, value in values.items() if path.startswith("own.")})
    run = _run({path: value for path, value in values.items() if not path.startswith("own.")})
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, train_data=("any",), tokenizer_model="any"))
    if options.gpus < 1 or options.gpu_memory <= 0:
        found.append(f"--gpus {options.gpus} --gpu-memory {options.gpu_memory:g}: expected positive numbers. Correct them.")
    whole = dataclasses.replace(run, parallel=ParallelConfig())
    if found := [*found, *problems(whole, 1)]:
        raise ConfigError(found)
    return run, frozenset(path.split(".")[1] for path in values if path.startswith("parallel.")), options


def _parse_with(
    argv: Sequence[str], world_size: int, kind: type, aliases: Mapping[str, str]
) -> tuple[RunConfig, frozenset[str], Any]:
    own = _own_flags(kind, aliases)
    values, found = read_flags(argv, own)
    options = kind(**{path.removeprefix("own."): value for path, value in values.items() if path.startswith("own.")})
    run = _run({path: value for path, value in values.items() if not path.startswith("own.")})
    found += problems(run, world_size, training=False)
    if found:
        raise ConfigError(found)
    return run, _explicit(values), options


def read_flags(argv: Sequence[str], own: Sequence[_Flag]) -> tuple[Values, list[str]]:
    """Command line -> (field values, problems).

    Args:
        argv: without the program's name.
        own: flags of a command beside the run's; their paths start with "own.".
    """
    table, parser = _parser(tuple(own))
    given, unknown = parser.parse_known_args(_last_length_wins(argv))
    found = [
        _unknown(word, parser)
        for before, word in zip(["", *unknown], unknown, strict=False)
        if word.startswith("-") or not before.startswith("-")  # the value of an unknown flag is no problem of its own
    ]
    raw = {"--" + name.replace("_", "-"): value for name, value in vars(given).items()}
    values: Values = {}
    for name, value in raw.items():
        if name in table:
            _convert(table[name], value, values, found)
        elif name in flags.SWITCHES:
            values |= dict(flags.SWITCHES[name])
        elif name in flags.NO_EFFECT:
            logger.info("%s has no effect: %s.", name, flags.NO_EFFECT[name][1])
    for name, derive in DERIVED.items():
        if name in raw:
            derive(raw, values, found)
    return values, found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message}. See --help."])


@functools.cache
def _parser(own: tuple[_Flag, ...]) -> tuple[dict[str, _Flag], argparse.ArgumentParser]:
    """({name: flag}, all flags as argparse wants them)."""
    table = {flag.name: flag for flag in [*_core_flags(), *_config_flags(), *own]}
    parser = _Parser(prog="megatron-sft", allow_abbrev=False, usage="%(prog)s [flags]", description=__doc__.split("\n\n")[0])
    for flag in table.values():
        _add(parser, flag)
    for name in flags.SWITCHES:
        parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=_switch_help(name))
    for name, (count, why) in flags.NO_EFFECT.items():
        kind: dict[str, Any] = {"nargs": count} if count else {"action": "store_true"}
        parser.add_argument(name, default=argparse.SUPPRESS, help=f"no effect: {why}", **kind)
    for name, (nargs, text) in DERIVED_HELP.items():
        kind = {"action": "store_true"} if nargs == 0 else {"nargs": nargs}
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **kind)
    return table, parser


@functools.cache
def _documented_fields(section: str) -> dict[str, tuple[str, str]]:
    """{field: (annotation, the docstring under it)} of a dataclass of run.py, read from its source."""
    tree = ast.parse(Path(config.__file__).read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section)
    texts: dict[str, tuple[str, str]] = {}
    for item, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = after.value.value if documented else ""  # type: ignore[union-attr]
            texts[item.target.id] = (ast.unparse(item.annotation), text)
    return texts


def _config_flags() -> list[_Flag]:
    made = [
        _Flag("--" + field.replace("_", "-"), f"{name}.{field}", annotation, text)
        for name, section in SECTIONS.items()
        for field, (annotation, text) in _documented_fields(section.__name__).items()
        if field not in ("core", "rope_scaling", "window_size", "window_layers", "split", "train_data", "train_names")
    ]
    by_path = {flag.path: flag for flag in made}
    core = transformer_config_fields()
    for name, path in flags.SPELLINGS.items():
        field = path.removeprefix("core.")
        annotation = by_path[path].annotation if path in by_path else core.get(field, ("str", None))[0]
        made.append(_Flag(name, path, annotation, f"the same as --{path.split('.')[1].replace('_', '-')}"))
    return made


def _core_flags() -> list[_Flag]:
    return [
        _Flag("--" + name.replace("_", "-"), f"core.{name}", annotation, "megatron-core TransformerConfig")
        for name, (annotation, _) in transformer_config_fields().items()
        if "Callable" not in annotation and "--" + name.replace("_", "-") not in _OTHER_TABLES
    ]


def _own_flags(kind: type, aliases: Mapping[str, str]) -> list[_Flag]:
    fields = _documented_fields(kind.__name__)
    spelled = {"--" + name.replace("_", "-"): name for name in fields} | dict(aliases)
    return [_Flag(flag, f"own.{name}", *fields[name]) for flag, name in spelled.items()]


def _add(parser: argparse.ArgumentParser, flag: _Flag) -> None:
    text = flag.help.replace("%", "%%") or None
    if _is_bool(flag.annotation):
        parser.add_argument(flag.name, action="store_const", const="true", default=argparse.SUPPRESS, help=text)
        negative = "--no-" + flag.name[2:]
        if negative not in _OTHER_TABLES and not flag.path.startswith("own."):
            parser.add_argument(
                negative,
                dest=flag.name[2:].replace("-", "_"),
                action="store_const",
                const="false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
    elif flag.path == "own.prompt":
        parser.add_argument(flag.name, action="append", default=argparse.SUPPRESS, help=text)
    else:
        parser.add_argument(flag.name, nargs="+" if _is_list(flag.annotation) else None, default=argparse.SUPPRESS, help=text)


def _is_bool(annotation: str) -> bool:
    return annotation.split("|")[0].strip() in ("bool", "Optional[bool]")


def _is_list(annotation: str) -> bool:
    return annotation.startswith(("tuple[", "Mapping[", "list[", "List[", "Optional[List[", "Optional[list["))


def _convert(flag: _Flag, value: Any, values: Values, found: list[str]) -> None:
    """Puts the converted value of a flag in `values`, or a sentence in `found`."""
    try:
        converted = _typed(flag.annotation, value)
    except ValueError as error:
        found.append(f"{flag.name} {value}: {error}. Give a value of type {flag.annotation}.")
        return
    choices = flags.CHOICES.get(flag.path)
    if choices and converted not in choices:
        near = difflib.get_close_matches(str(converted), choices, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        found.append(f"{flag.name} {converted}: expected one of {', '.join(choices)}.{hint}")
        return
    values[flag.path] = converted


def _typed(annotation: str, value: Any) -> Any:
    if _is_bool(annotation):
        return value == "true"
    if annotation.startswith("Mapping["):
        return dict(item.split("=", 1) for item in value)
    if _is_list(annotation):
        item = "float" if "float" in annotation else "int" if "int" in annotation else "str"
        parts = [_scalar(item, part) for part in value]
        return tuple(parts) if annotation.startswith("tuple") else parts
    return _scalar(annotation, value)


def _scalar(annotation: str, text: str) -> Any:
    """int before float before text, as far as the annotation allows; [0]*3+[1]*58 where it allows a list."""
    if "int" in annotation or "float" in annotation:
        for kind in ("int", "float"):
            if kind in annotation:
                try:
                    return int(text) if kind == "int" else float(text)
                except ValueError:
                    continue
        if "List" in annotation or "list" in annotation:
            return integers(text)
        if "str" not in annotation:
            raise ValueError("not a number")
    return text


def _switch_help(name: str) -> str:
    set_to = [f"{path.split('.')[1]} = {value}" for path, value in flags.SWITCHES[name]]
    return ", ".join(set_to) or "another flag says it; accepted because every conf has it"


def _unknown(name: str, parser: argparse.ArgumentParser) -> str:
    flag = name.split("=")[0]
    if flag in flags.PROBLEMS:
        return f"{flag}: {flags.PROBLEMS[flag]}"
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]}?" if near else "See --help."
    return f"{flag}: unknown {'flag' if flag.startswith('-') else 'value; no flag takes it'}. {hint}"


def _last_length_wins(argv: Sequence[str]) -> list[str]:
    """Of --train-iters, --train-samples and --num-epoch the last one counts, with schedule lengths of its own unit.

    finetune.sh gives --train-samples by default, so that a user's --num-epoch in MLM_EXTRA_ARGS has to win.
    """
    names = dict(LENGTHS) | {name: path for name, path in flags.SPELLINGS.items() if path in LENGTHS.values()}
    places = [index for index, word in enumerate(argv) if word.split("=")[0] in names]
    winner = names[argv[places[-1]].split("=")[0]] if places else None
    dropped: set[int] = set()
    for index, word in enumerate(argv):
        flag = word.split("=")[0]
        loses = index in places and names[flag] != winner
        other_unit = "iters" if winner == "train.train_samples" else "samples"
        stale = places and index < places[-1] and flag in (f"--lr-decay-{other_unit}", f"--lr-warmup-{other_unit}")
        if loses or stale:
            logger.info("%s has no effect: %s comes later.", " ".join(argv[index : index + 2]), argv[places[-1]])
            dropped |= {index} if "=" in word else {index, index + 1}
    return [word for index, word in enumerate(argv) if index not in dropped]


_OTHER_TABLES = frozenset([*flags.SWITCHES, *flags.NO_EFFECT, *flags.PROBLEMS, *DERIVED_HELP])


def _explicit(values: Values) -> frozenset[str]:
    """Names of the ModelConfig fields in `values`; "core" when any TransformerConfig field is."""
    named = {path.split(".")[1] for path in values if path.startswith("model.")}
    return frozenset(named | ({"core"} if any(path.startswith("core.") for path in values) else set()))


def _run(values: Values) -> RunConfig:
    """The RunConfig of the given values; one epoch where no length is given."""
    if not any(path in values for path in LENGTHS.values()):
        values = {**values, "train.num_epoch": 1.0}
    if "data.seed" not in values and "train.seed" in values:
        values = {**values, "data.seed": values["train.seed"]}
    sections: dict[str, Values] = {name: {} for name in SECTIONS}
    core: Values = {}
    for path, value in values.items():
        section, name = path.split(".", 1)
        (core if section == "core" else sections[section])[name] = value
    sections["model"]["core"] = core
    tensor_size = sections["parallel"].get("tensor_model_parallel_size", 1)
    sections["parallel"].setdefault("expert_tensor_parallel_size", tensor_size)  # Megatron-LM's default
    if tensor_size == 1:  # confs with experts ask for it; as Megatron-LM has it
        sections["parallel"].pop("sequence_parallel", None)
    if "tokenizer_model" not in sections["data"] and sections["checkpoint"].get("load"):
        sections["data"]["tokenizer_model"] = sections["checkpoint"]["load"]
    return RunConfig(**{name: SECTIONS[name](**given) for name, given in sections.items()})
