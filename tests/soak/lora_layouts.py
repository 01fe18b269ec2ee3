"""Every layout of tests/distributed/lora_rig.py on two processes, beside one: python tests/soak/lora_layouts.py [WORD ...]

Words choose cases whose names have one of them.
"""

import sys
import tempfile
from pathlib import Path

from tests.distributed.lora_rig import ALONE, CASES, faults, folders, same_alone, train_cases
from tests.gloo import run_ranks

TOGETHER = 6
"""Cases in one process group."""


def main(words: list[str]) -> int:
    """Prints how each layout differs; 1 where one does."""
    with tempfile.TemporaryDirectory() as root:
        hf = folders(Path(root))
        chosen = [name for name in CASES if not words or any(word in name for word in words)]
        needed = {name: ALONE[name] for name in (same_alone(CASES[name]) for name in chosen)}
        alone = run_ranks(train_cases, 1, needed, hf, timeout_s=500)[0]
        found = {}
        for first in range(0, len(chosen), TOGETHER):
            cases = {name: CASES[name] for name in chosen[first : first + TOGETHER]}
            ranks = run_ranks(train_cases, 2, cases, hf, timeout_s=500)
            for name, case in cases.items():
                found[name] = faults([rank[name] for rank in ranks], alone[same_alone(case)])
                print(f"{name:24} {'; '.join(found[name]) or 'equal'}", flush=True)
    print(f"{sum(not texts for texts in found.values())} of {len(found)} layouts equal one process")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
