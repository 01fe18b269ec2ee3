"""At least 20 layouts beside one process: losses, gradient norms and parameters after 10 steps, fp32 over gloo.

    python tests/soak/layouts.py [--only NAME ...]

Rows, models and bars are those of tests/distributed/layout_rig.py. Exits with 1 when a layout is over a bar.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.distributed.layout_rig import CASES, LOSS_BAR, NORM_BAR, PARAMETER_BAR, REFERENCES, compared, folders, train_cases
from tests.gloo import run_ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="layouts; all without it")
    only = parser.parse_args().only
    os.environ["PYTHONWARNINGS"] = "ignore"
    over, count, began = [], 0, time.monotonic()
    print(f"{'processes':>9}  {'layout':30}{'loss':>9}{'norm':>9}{'parameters':>11}{'ragged':>8}{'empty':>6}  worst parameter")
    with tempfile.TemporaryDirectory() as root:
        hf = folders(Path(root))
        alone = run_ranks(train_cases, 1, CASES[1], hf, timeout_s=600)[0]
        for size, cases in CASES.items():
            wanted = {name: value for name, value in cases.items() if not only or name in only}
            if not wanted:
                continue
            ranks = [alone] if size == 1 else run_ranks(train_cases, size, wanted, hf, timeout_s=1200)
            for name, value in wanted.items():
                reference = alone[REFERENCES.get(value.model, value.model)]
                found = compared([rank[name] for rank in ranks], reference)
                over += [] if found.within else [name]
                count += size > 1 or value.micro_batch_size > 1
                print(
                    f"{size:>9}  {name:30}{found.loss:>9.1e}{found.norm:>9.1e}{found.parameter:>11.1e}{found.spread:>7.0f}x"
                    f"{found.empty_parts:>6}  {found.parameter_name}{'' if found.within else '  OVER'}",
                    flush=True,
                )
    print(
        f"{count} layouts and splits in {time.monotonic() - began:.0f} s; bars: loss {LOSS_BAR:g}, gradient norm {NORM_BAR:g}, "
        f"parameters {PARAMETER_BAR:g}; over: {', '.join(over) or 'none'}"
    )
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
