"""Every number and word of the configuration, by flag and by program: in its range, or an error that says the range."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_sft.config import options
from megatron_sft.config.arguments import Flag, flag_table, parse, read_flags
from megatron_sft.config.core_fields import MoEConfig
from megatron_sft.config.fields import MOST, Kind, Number, Words, kind_of, kinds, range_problems
from megatron_sft.config.problems import problems
from megatron_sft.config.run import EFFECTIVE, Count, ModelConfig, RunConfig
from megatron_sft.errors import ConfigError

COMMANDS = [
    None,
    *(options.GenerateConfig, options.MMLUConfig, options.EvalConfig, options.PlanConfig, options.ReportConfig),
    options.ViewConfig,
]
TEXTS = ["-1", "0", "nan", "inf", "-inf", "1e300", "1" * 5000, "0x10", "two", "", " "]
NEEDED = ["--load", "model", "--finetune-hf-dataset", "rows.jsonl"]


def numeric_flags() -> Iterator[tuple[Any, Flag]]:
    """Every flag of every command that takes numbers."""
    seen = set()
    for command in COMMANDS:
        for flag in flag_table(command).values():
            if flag.path and flag.words and flag.kind.base in (int, float) and flag.name not in seen:
                seen.add(flag.name)
                yield command, flag


def has_meaning(kind: Kind, text: str) -> bool:
    """Whether a text is a number that the field may have, found by other means than the parser's."""
    try:
        value = int(text) if kind.base is int else float(text)
    except ValueError:
        return False
    assert isinstance(kind.rule, Number)
    return math.isfinite(value) and (kind.rule.least <= value <= kind.rule.most or value in kind.rule.also)


@pytest.mark.parametrize(("command", "flag"), [pytest.param(*pair, id=pair[1].name) for pair in numeric_flags()])
def test_a_number_is_in_its_range_or_refused(command: Any, flag: Flag) -> None:
    for text in TEXTS:
        values, found = read_flags([flag.name, text], command)
        if has_meaning(flag.kind, text):
            assert flag.path in values and not found, (text, found)
        else:
            assert flag.path not in values and len(found) == 1, (text, values, found)
            assert found[0].startswith(f"{flag.name} {text}: expected ") and found[0].endswith(" Correct it."), found


DERIVED_NUMBERS = {
    "--split": ([], ["0"]),
    "--use-rope-scaling --rope-scaling-factor": ([], []),
    "--rope-scaling-factor": ([], []),
    "--rope-scaling": ([], []),
    "--num-layers 4 --window-size": (["0"], []),
    "--num-layers 4 --window-attn-skip-freq": ([], []),
    "--num-layers 4 --num-layers-per-virtual-pipeline-stage": ([], []),
    "--moe-layer-freq": ([], []),
    "--no-rope-freq": ([], []),
    "--hybrid-layer-pattern": ([], []),
    "--role-map": ([], []),
}
"""Flags of derived_flags.py after what they need, and which of TEXTS are right."""


@pytest.mark.parametrize("flags", DERIVED_NUMBERS)
def test_a_number_that_no_field_holds_alone_is_in_its_range_or_refused(flags: str) -> None:
    right, _ = DERIVED_NUMBERS[flags]
    for text in TEXTS:
        try:
            parse([*NEEDED, *flags.split(), text], 1)
            refused = False
        except ConfigError as error:
            refused = any(problem.startswith(flags.split()[-1]) for problem in error.problems)
            assert refused, error
        assert refused != (text in right), text


def test_every_numeric_field_says_its_range() -> None:
    """A new field without one is found here, and nan and infinity are in none."""
    described = [*(type(getattr(RunConfig(), field.name)) for field in dataclasses.fields(RunConfig)), *COMMANDS[1:]]
    named = {f"{kind.__name__}.{name}": value for kind in described for name, value in kinds(kind).items()}
    named |= {f"core.{name}": kind for name, kind in EFFECTIVE.items()}
    numbers = {name: kind for name, kind in named.items() if kind.base in (int, float)}
    assert len(numbers) > 100
    assert [name for name, kind in numbers.items() if not isinstance(kind.rule, Number)] == []
    for name, kind in numbers.items():
        assert not any(kind.has(value) for value in (math.nan, math.inf, -math.inf, 1e300, True, "1")), name
        assert kind.rule.least <= kind.rule.most < 2**63 and (kind.base is float or kind.rule.most <= 10**12), name
    wordless = {name for name, kind in named.items() if kind.base is str and not isinstance(kind.rule, Words)}
    wordless -= {"OptimConfig.param_groups"}  # a table of its own: config/groups.py
    assert {name.split(".")[0] for name in wordless} <= {
        "DataConfig", "CheckpointConfig", "LoraConfig", "TrainConfig", "LogConfig", "TasksConfig",
        "GenerateConfig", "ReportConfig", "ViewConfig", "PlanConfig", "MMLUConfig", "EvalConfig", "core"
    }  # fmt: skip


def test_every_default_is_in_its_range() -> None:
    """But for the sizes of a model, which are 0 until they are said."""
    unsaid = {name for name in kinds(ModelConfig) if getattr(ModelConfig, name, None) == 0}
    for section in [*(getattr(RunConfig(), field.name) for field in dataclasses.fields(RunConfig)), *(c() for c in COMMANDS[1:])]:
        wrong = [name for name, kind in kinds(type(section)).items() if not kind.has(getattr(section, name))]
        assert set(wrong) <= (unsaid if isinstance(section, ModelConfig) else set())
        assert range_problems(section) == []


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("optim", {"lr": math.inf}, "--lr is inf; expected a number from 0 to 1. Correct it."),
    ("train", {"micro_batch_size": True}, "--micro-batch-size is True; expected a whole number from 1 to 1048576."),
    ("parallel", {"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size is 0; expected a whole number from 1"),
    ("model", {"activation": "relu"}, "--activation is relu; expected one of silu, gelu, gelu_tanh"),
    ("model", {"moe": MoEConfig(moe_router_topk=0)}, "--moe-router-topk is 0; expected a whole number from 1"),
    ("model", {"core": {"moe_router_topk": 4}}, "model setting 'moe_router_topk': expected outside of `core`"),
    ("model", {"core": {"moe_router_top_k": 2}}, "model setting 'moe_router_top_k': .* Did you mean moe_router_topk?"),
]


@pytest.mark.parametrize(("section", "values", "expected"), WRONG)
def test_a_programs_configuration_is_held_to_the_same_ranges(section: str, values: dict[str, Any], expected: str) -> None:
    run = RunConfig()
    run = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **values)})
    found = problems(run, 1)
    assert len(found) == 1 and re.match(expected, found[0]), found


def test_annotations_are_taken_apart() -> None:
    assert kind_of(Count | None) == Kind(int, Number(1, MOST), "one", True)
    assert kind_of(tuple[Count, ...]) == Kind(int, Number(1), "several")
    assert kind_of(Count | list[Count]) == Kind(int, Number(1), "either")
    assert (kind_of(Count | list[Count]).read(["3"]), kind_of(tuple[Count, ...]).read(["3", "4"])) == (3, (3, 4))
    assert Number(0.01, 100, also=(0,)).expected("a number") == "0 or a number from 0.01 to 100"


def test_what_follows_from_a_wrong_value_is_not_reported_beside_it() -> None:
    """--lr x leaves the default, which --min-lr is above; nothing is said of that."""
    with pytest.raises(ConfigError) as error:
        parse([*NEEDED, "--lr", "x", "--min-lr", "1e-3", "--eval-iters", "-2"], 1)
    assert error.value.problems == (
        "--lr x: expected a number from 0 to 1. Correct it.",
        "--eval-iters -2: expected a whole number from -1 to 1000000000000. Correct it.",
    )
