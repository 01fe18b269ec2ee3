"""SmolLM2-135M-Instruct on GSM8K in fp32: NLL of 16 held-out rows before and after 30 steps of about 2,100 tokens.

    PYTHONPATH=. python tests/soak/smollm2.py      a quarter of an hour; needs `make model`

1.4560 +- 0.002 before, at most 0.85 after. Prints both; exits with 1 if one is missed.
"""

import sys
import tempfile
from pathlib import Path

from tests.functional.conftest import metrics_of
from tests.functional.test_smollm2 import LOSSES, THIRTY_STEPS, finetune, nll_before


def main() -> int:
    before, tokens = nll_before()
    with tempfile.TemporaryDirectory() as folder:
        finetune(*THIRTY_STEPS, "--save", folder)
        lines = metrics_of(Path(folder))
    after, first = lines[-1]["valid/loss"], [line["sft/loss"] for line in lines[: len(LOSSES)]]
    size = lines[-1]["sft/tokens_seen"] / 30
    print(f"NLL over {tokens} tokens: {before:.4f} before, {after:.4f} after 30 steps of {size:.0f} tokens")
    print("first losses", *(f"{loss:.5f}" for loss in first))
    return 0 if abs(before - 1.4560) <= 0.002 and after <= 0.85 else 1


if __name__ == "__main__":
    sys.exit(main())
