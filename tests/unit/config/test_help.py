"""--help of every command: grouped, each flag with default and unit, the twenty first; the package that brings the commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sft import __main__ as commands
from megatron_sft.config.help import TITLES, default_of, entry, help_of, shown_flags, unit_of
from megatron_sft.config.options import COMMANDS, FIRST, GROUPS
from megatron_sft.config.run import RunConfig

ROOT = Path(__file__).parents[3]


def sections(text: str) -> dict[str, list[str]]:
    """{title: flags} of a page of --help."""
    found: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        title, *lines = block.split("\n")
        found[title] = [words[0].replace("[no-]", "") for line in lines if (words := line.split()) and words[0].startswith("--")]
    return found


def test_the_table_has_every_command_and_every_section() -> None:
    assert COMMANDS.keys() == commands.COMMANDS.keys()
    assert GROUPS.keys() == RunConfig.__dataclass_fields__.keys()


def test_twenty_flags_come_first_then_the_groups() -> None:
    found = sections(help_of("finetune", ["--help"]))
    assert len(FIRST) == 20 and found["first of all"] == FIRST
    assert [title for title in found if title in TITLES.values()] == list(GROUPS.values())
    flags = [flag for listed in found.values() for flag in listed]
    assert len(flags) == len(set(flags)) < 200
    assert not {"--moe-router-topk", "--use-mcore-models", "--rollout-batch-size"} & set(flags)


def test_help_all_adds_what_help_leaves_out() -> None:
    found, short = (sections(help_of("finetune", [word])) for word in ("--help-all", "--help"))
    assert list(found)[-5:-1] == ["logging", "megatron-core's settings", "other spellings", "accepted without effect here"]
    assert "--moe-router-topk" in found["megatron-core's settings"] and "--sft" in found["accepted without effect here"]
    assert all(set(short[title]) <= set(found[title]) for title in GROUPS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_text_and_default_and_every_number_a_unit_or_none(name: str) -> None:
    for flag in shown_flags(COMMANDS[name], is_all=True):
        said = entry(flag)
        assert said["help"], f"{flag.name} has no text"
        assert said["group"] in TITLES.values()
        assert bool(said["unit"]) == bool(flag.words), flag.name
    text = help_of(name, ["--help"])
    assert "\nexamples\n" in text and all(len(line) <= 130 for line in text.split("\n"))


def test_defaults_and_units_are_the_fields() -> None:
    flags = {flag.name: flag for flag in shown_flags(COMMANDS["finetune"], is_all=False)}
    shown = {name: (default_of(flags[name]), unit_of(flags[name])) for name in ("--seq-length", "--shuffle", "--lr", "--packing")}
    assert shown == {
        "--seq-length": ("4096", "TOKENS"),
        "--shuffle": ("on", ""),
        "--lr": ("5e-05", "NUMBER"),
        "--packing": ("best-fit", "best-fit|sequential|none"),
    }
    assert "  --[no-]shuffle  " in help_of("finetune", ["--help"])


def test_a_command_shows_its_own_flags() -> None:
    export = sections(help_of("export", ["--help"]))
    assert {"--load", "--save-hf"} <= set(export["first of all"])
    assert "--lr" not in str(export) and "--seq-length" not in str(export)
    generate = sections(help_of("generate", ["-h"]))
    assert {"--osl", "--temperature", "--output"} <= set(generate["this command"])
    assert sections(help_of("conf", ["--help"]))["usage: megatron-sft conf FOLDER"] == []


def test_help_json_is_for_programs() -> None:
    said = json.loads(help_of("plan", ["Qwen/Qwen3-8B", "--help-json"]))
    flags = {flag["flag"]: flag for flag in said["flags"]}
    assert (said["command"], said["place"]) == ("plan", "CONF")
    assert flags["--gpu-memory"]["unit"] == "GB" and flags["--gpu-memory"]["default"] == "80"
    assert flags["--seq-length"]["first"] and not flags["--lr-warmup-iters"]["first"]


def test_a_value_that_looks_like_help_is_none() -> None:
    assert help_of("generate", ["--prompt", "-h", "--osl", "3"]) == ""


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2), (["fintune", "--lr", "1"], 2)])
def test_the_program_itself_lists_the_commands(words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(words) == status
    output = capsys.readouterr()
    said = output.err if status else output.out
    assert all(re.search(rf"^  {name} +[A-Z]", said, re.MULTILINE) for name in COMMANDS)
    assert ("Did you mean finetune?" in said) == (words[:1] == ["fintune"])


@pytest.mark.parametrize("script", ["finetune.py", "generate.py"])
def test_scripts_show_help_without_torch(script: str) -> None:
    code = f"import sys, runpy\nsys.argv = [{script!r}, '--help']\ntry: runpy.run_path({script!r}, run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "--load" in done.stdout
