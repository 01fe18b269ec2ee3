"""Fine-tunes a language model on conversations. The entry of examples/post_training/modelopt/finetune.sh.

    python finetune.py --load HF_FOLDER --tokenizer-model HF_FOLDER --finetune-hf-dataset chats.jsonl --save OUT --num-epoch 3
    torchrun --nproc_per_node 8 finetune.py --tensor-model-parallel-size 2 ...

Exit status: 0 trained to the end, 2 wrong input, 3 stopped by a bad value or a fault, 128 + n ended by signal n
(a checkpoint was saved), 4 ended by --exit-duration-in-mins or --exit-interval (likewise).
"""

import sys
from collections.abc import Sequence

from megatron_sft import entry
from megatron_sft.__main__ import finetune


def main(argv: Sequence[str]) -> int:
    """Runs one training; returns the exit status."""
    return entry.run(finetune, argv)


if __name__ == "__main__":
    entry.leave(main(sys.argv[1:]))
