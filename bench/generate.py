"""Decode speed against transformers' generate, greedy, on the CPU, at batch 1 and 8, in bf16 and fp32.

python bench/generate.py MODEL_FOLDER [NEW_TOKENS] [bf16|fp32]

Seconds are of processor time over all threads (both sides compute nothing else), so that other work on the machine does not
show; the faster of two runs of each.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_sft import parallel
from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.run import CheckpointConfig, DataConfig, RunConfig, TrainConfig
from megatron_sft.inference.generation import generate
from megatron_sft.inference.load import load_for_inference

QUESTIONS = [f"Tom has {n} apples and buys {n + 2} more. How many has he?" for n in range(3, 11)]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def seconds_of(action: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds and the result."""
    begin = time.process_time()
    result = action()
    return time.process_time() - begin, result


def compare(folder: str, dtype: str, new_tokens: int) -> None:
    """Prints tokens per second of both, and their ratio, after one run of each to warm up."""
    from transformers import AutoModelForCausalLM

    train = TrainConfig(params_dtype=dtype)
    run = RunConfig(train=train, checkpoint=CheckpointConfig(load=folder), data=DataConfig(tokenizer_model=folder))
    loaded = load_for_inference(run, frozenset())
    tokenizer = loaded.tokenizer
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    reference.generation_config.eos_token_id = None
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    for batch_size in (1, 8):
        prompts = tokenizer(texts[:batch_size], add_special_tokens=False)["input_ids"]
        padded: Any = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        options = GenerateConfig(osl=new_tokens, batch_size=batch_size)

        def ours(prompts: Any = prompts, options: Any = options) -> Any:
            return generate(loaded.chunks, prompts, options, (), loaded.ranks)

        def theirs(padded: Any = padded) -> Any:
            return reference.generate(**padded, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)

        pairs = [(seconds_of(ours), seconds_of(theirs)) for _ in range(3)][1:]
        mine, other = (min(pair[side][0] for pair in pairs) for side in range(2))
        answers, row = pairs[0][0][1], pairs[0][1][1]
        same = [answer.tokens for answer in answers] == row[:, padded["input_ids"].shape[1] :].tolist()
        print(
            f"{dtype}, batch {batch_size}: {batch_size * new_tokens / mine:.1f} tokens/s, "
            f"transformers {batch_size * new_tokens / other:.1f}, ratio {other / mine:.2f}, tokens equal: {same}"
        )
    parallel.finalize()


def main(folder: str, new_tokens: str = "32", *dtypes: str) -> None:
    """Both dtypes unless one is named."""
    for dtype in dtypes or DTYPES:
        compare(folder, dtype, int(new_tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
