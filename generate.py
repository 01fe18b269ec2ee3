"""Generates answers with a Hugging Face folder or a Megatron checkpoint.

python generate.py --load MODEL                                  a conversation, in a terminal
torchrun --nproc_per_node 1 generate.py --load MODEL --prompt "What is 2 + 2?"
cat prompts.txt | python generate.py --load MODEL --output answers.jsonl
"""

import sys
from collections.abc import Sequence
from typing import Any

from megatron_sft import entry, hub
from megatron_sft.core_compat import leave_out_compiler


def generate(argv: Sequence[str], world_size: int) -> int:
    """Answers every prompt and shows the answers."""
    from megatron_sft.config.arguments import parse
    from megatron_sft.config.options import GenerateConfig

    run, explicit, options = parse(argv, world_size, options=GenerateConfig)
    run = hub.fetched(run)
    leave_out_compiler()
    from megatron_sft.inference.prompts import answer_prompts

    answer_prompts(run, explicit, options, show)
    return 0


def show(rows: Sequence[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, start=1):
        asked = "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"])
        print(f"\n=== {number}\n{asked}\n--- answer ({len(row['tokens'])} tokens, {row['finish_reason']})\n{row['response']}")


def main(argv: Sequence[str]) -> int:
    """Returns the process's exit status."""
    return entry.run(generate, argv, to_stderr=True)


if __name__ == "__main__":
    entry.leave(main(sys.argv[1:]))
