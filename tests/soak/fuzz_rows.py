"""100,000 mutated lines: each is kept or refused with a reason, none raises anything else.

PYTHONPATH=. python tests/soak/fuzz_rows.py [LINES]
"""

import sys
import time

from tests.unit.data.test_schema import fuzz

if __name__ == "__main__":
    lines = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    start = time.monotonic()
    kept, refused = fuzz(lines, seed=1)
    print(f"{lines} lines: {kept} kept, {refused} refused, {lines - kept - refused} lost, {time.monotonic() - start:.1f} s")
    sys.exit(kept + refused != lines)
