"""The commands and flags that README.md and docs/ show exist: each shell line is run with a launcher that does nothing."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_sft.__main__ import COMMANDS
from megatron_sft.config.arguments import flag_table, parse
from megatron_sft.config.help import ASKS
from megatron_sft.config.options import COMMANDS as OPTIONS
from megatron_sft.config.options import EvalConfig, GenerateConfig, MMLUConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
READERS = {
    "finetune.py": lambda words: parse(words, 4),
    "generate.py": lambda words: parse(words, 4, options=GenerateConfig),
    "mmlu": lambda words: parse(words, 4, options=MMLUConfig),
    "eval": lambda words: parse(words, 4, options=EvalConfig),
    "convert": lambda words: parse(words, 4, training=False),
    "export": lambda words: parse(words, 4, training=False),
}
LAUNCHER = "import json, os, sys\nopen(os.environ['COLLECTED'], 'a').write(json.dumps(sys.argv[1:]) + chr(10))\n"


def scripts_of(page: Path) -> list[str]:
    """The page's bash blocks that run a script of the examples."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if "./" in block]


@pytest.mark.parametrize("page", [page for page in PAGES if scripts_of(page)], ids=lambda page: page.name)
def test_shown_commands_parse(page: Path, tmp_path: Path) -> None:
    launcher, collected = tmp_path / "launcher.py", tmp_path / "collected"
    launcher.write_text(LAUNCHER)
    environment = {**os.environ, "COLLECTED": str(collected), "PYTHON": sys.executable}
    environment["LAUNCH_SCRIPT"] = f"'{sys.executable}' '{launcher}'"
    for block in scripts_of(page):
        lines = "\n".join(line for line in block.split("\n") if not line.startswith(("pip ", "huggingface-cli ")))
        subprocess.run(["bash", "-euc", lines], cwd=ROOT, env=environment, check=True, timeout=60)
    for line in collected.read_text().splitlines():
        words = list(itertools.dropwhile(lambda word: Path(word).name not in READERS, json.loads(line)))  # the launcher's own
        READERS[Path(words[0]).name](words[1:])


def test_the_commands_named_in_the_pages_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"`megatron-sft ([\w-]+)", page.read_text(encoding="utf-8"))}
    assert named <= COMMANDS.keys()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_flags_that_an_assistant_is_told_of_exist() -> None:
    known = {flag for command in OPTIONS.values() for flag in flag_table(command.options)} | set(ASKS)
    for page in (ROOT / "AGENTS.md", ROOT / "README.md"):
        text = re.sub(r"^\| (nanochat|verl|TRL) .*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) <= known, page.name
    named = set(re.findall(r"megatron-sft ([a-z]+)", (ROOT / "AGENTS.md").read_text(encoding="utf-8")))
    assert named <= COMMANDS.keys() and {"doctor", "plan", "preview", "report"} <= named


def test_the_picture_is_small_and_made_by_its_script() -> None:
    picture = ROOT / "docs" / "picture.svg"
    assert picture.stat().st_size < 20_000
    root = ElementTree.fromstring(picture.read_text())
    assert len(root.findall("{*}polyline")) == 2 and [r for r in root.findall("{*}rect") if r.get("fill") == "#bfe8bf"]
