"""Modules of megatron_sft import only what the table allows, so that each part can be read, used and tested alone.

ALLOWED is the whole architecture: each module or package of megatron_sft and the others it may import. Imports inside
functions count. USES_CORE: the only ones that may import megatron-core. Nothing imports megatron.training.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "megatron_sft"
ROOT = Path(__file__).resolve().parents[2]
EVERY = {"config", "core_compat", "environment", "errors", "files", "lock", "log"}
ALLOWED: Mapping[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "lock": {"log"},
    "log": set(),
    "pages": {"errors", "log"},
    "attempts": set(),
    "output": {"errors", "files", "log"},
    "shell": {"errors"},
    "requirements": set(),
    "core_compat": {"log"},
    "environment": {"errors"},
    "entry": EVERY | {"parallel"},
    "launch": {"environment", "errors"},
    "hub": EVERY | {"checkpoint"},  # which run goes on from --save and needs no other weights
    "config": {"errors", "log", "core_compat"},
    "parallel": EVERY,
    "data": {"config", "errors", "files", "lock", "log", "pages"},
    "report": {"attempts", "data", "errors", "log", "pages"},
    "kernels": {"core_compat", "errors"},
    "model": EVERY | {"kernels", "parallel"},
    "hf": EVERY | {"parallel", "model"},
    "checkpoint": EVERY | {"parallel"},
    "weights": EVERY | {"parallel", "model", "hf", "checkpoint"},
    "conversion": EVERY | {"parallel", "model", "hf", "checkpoint", "weights"},
    "inference": EVERY | {"hub", "parallel", "model", "hf", "checkpoint", "weights", "data", "output"},
    "tasks": EVERY | {"parallel", "data", "model", "inference", "output"},
    "train": EVERY
    | {"attempts", "kernels", "parallel", "data", "model", "hf", "checkpoint", "weights", "plan", "inference", "tasks"},
    "plan": EVERY | {"hub", "parallel", "model", "hf", "shell", "weights"},
    "doctor": EVERY | {"hub", "parallel", "model", "hf", "weights", "data", "train", "plan"},
    "__main__": EVERY
    | set("checkpoint conversion data doctor entry hf hub inference output pages parallel plan report shell tasks train".split()),
}
USES_CORE = set(ALLOWED) - set(
    "attempts environment errors files kernels lock log config data entry hub launch output pages report".split()
    + "requirements shell __main__".split()
)


def imported_modules(tree: ast.AST, dotted: str) -> Iterator[str]:
    """Absolute names of every import in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = dotted.split(".")[: -node.level] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            yield from ((f"{stem}.{alias.name}" for alias in node.names) if stem == PACKAGE else [stem])


def violations(root: Path) -> list[str]:
    """One line a forbidden import below root/megatron_sft."""
    found = []
    for path in sorted(Path(root, PACKAGE).rglob("*.py")):
        dotted = ".".join(path.relative_to(root).with_suffix("").parts)
        here = dotted.split(".")[1]
        if here == "__init__":
            continue
        for name in imported_modules(ast.parse(path.read_text(encoding="utf-8")), dotted):
            top = name.split(".")
            if top[0] == PACKAGE and len(top) > 1 and top[1] not in ALLOWED[here] | {here, "__version__"}:
                found.append(f"{dotted} imports {name}: {here} may not import {top[1]}")
            if top[:2] == ["megatron", "training"] or (top[0] == "megatron" and here not in USES_CORE):
                found.append(f"{dotted} imports {name}: not allowed in {here}")
    return found


def test_the_table_has_no_cycle() -> None:
    left = dict(ALLOWED)
    while left:
        free = [module for module, uses in left.items() if not uses & left.keys()]
        assert free, f"cycle among {sorted(left)}"
        for module in free:
            del left[module]


def test_every_import_is_in_the_table() -> None:
    assert violations(ROOT) == []


def test_config_needs_no_torch() -> None:
    """So that --help and configuration errors are quick; parsing is timed in config/test_arguments.py."""
    found = [
        f"{path.name}: {name}"
        for path in sorted(Path(ROOT, PACKAGE, "config").glob("*.py"))
        for name in imported_modules(ast.parse(path.read_text(encoding="utf-8")), f"{PACKAGE}.config.{path.stem}")
        if name.split(".")[0] in {"torch", "megatron", "transformers"}
    ]
    assert found == []


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    folder = tmp_path / PACKAGE / "data"
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text("def f():\n    from megatron.training import get_args\n    import megatron_sft.train.loop\n")
    assert violations(tmp_path) == [
        "megatron_sft.data.bad imports megatron.training: not allowed in data",
        "megatron_sft.data.bad imports megatron_sft.train.loop: data may not import train",
    ]
