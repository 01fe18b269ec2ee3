"""What shared rules of this code can be read off its syntax: lengths, forbidden names, where the environment is read."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted(ROOT.joinpath("megatron_sft").rglob("*.py")), ROOT / "finetune.py", ROOT / "generate.py"]
READS_ENVIRONMENT = {"arguments.py", "parallel.py", "core_compat.py", "environment.py"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60

Rule = Callable[[str, str], Iterator[str]]


def long_files(name: str, text: str) -> Iterator[str]:
    """A file over MAX_FILE_LINES."""
    count = len(text.splitlines())
    if count > MAX_FILE_LINES:
        yield f"{name}: {count} lines; expected at most {MAX_FILE_LINES}. Split it by concern."


def long_functions(name: str, text: str) -> Iterator[str]:
    """A function over MAX_FUNCTION_LINES, its decorators left out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {count} lines; expected at most {MAX_FUNCTION_LINES}."


def broad_excepts(name: str, text: str) -> Iterator[str]:
    """`except:`, `except Exception` and, unless it ends with `raise`, `except BaseException`; alone or in a tuple."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {"BaseException" if kind is None else ast.unparse(kind) for kind in kinds}
            cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if "Exception" in names or ("BaseException" in names and not cleans_up):
                yield f"{name}:{node.lineno}: catches everything; name the exact types."


def unfinished_work(name: str, text: str) -> Iterator[str]:
    """TODO, FIXME and NotImplementedError, in code and in comments."""
    for number, line in enumerate(text.splitlines(), start=1):
        for word in ("TODO", "FIXME", "NotImplementedError"):
            if word in line:
                yield f"{name}:{number}: {word}"


def foreign_letters(name: str, text: str) -> Iterator[str]:
    """Anything but ASCII."""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.isascii():
            yield f"{name}:{number}: {line.strip()!a} is not ASCII"


def machine_paths(name: str, text: str) -> Iterator[str]:
    """Strings and comments with a path that exists on one machine only."""
    for number, line in enumerate(text.splitlines(), start=1):
        if any(folder in line for folder in ("/home/", "/root/", "/work/", "/Users/")):
            yield f"{name}:{number}: an absolute path of one machine: {line.strip()}"


def environment_reads(name: str, text: str) -> Iterator[str]:
    """os.environ and os.getenv outside READS_ENVIRONMENT."""
    if name.rpartition("/")[2] in READS_ENVIRONMENT:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
            yield f"{name}:{node.lineno}: {ast.unparse(node)}; only {sorted(READS_ENVIRONMENT)} read the environment"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield f"{name}:{node.lineno}: from os import ...; write os.path, os.cpu_count ..."


def unsafe_loads(name: str, text: str) -> Iterator[str]:
    """torch.load without weights_only=True, which runs code that a checkpoint brings along."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if not any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords):
                yield f"{name}:{node.lineno}: torch.load without weights_only=True"


BROKEN: dict[Rule, str] = {
    long_files: "\n" * (MAX_FILE_LINES + 1),
    long_functions: "def f():\n" + "    1\n" * MAX_FUNCTION_LINES,
    broad_excepts: "try:\n    1\nexcept (ValueError, Exception):\n    2\n",
    unfinished_work: "# FIXME: later",
    foreign_letters: "# caf\u00e9",
    machine_paths: "path = '/home/me/data'",
    environment_reads: "import os\nos.environ.get('HOME')",
    unsafe_loads: "torch.load(file, weights_only=flag)",
}


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    found = [line for path in FILES for line in rule(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_rule_sees_a_breach(rule: Rule) -> None:
    assert len(list(rule("x.py", BROKEN[rule]))) == 1
