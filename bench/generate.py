"""Decode speed against transformers' generate, greedy, fp32 on the CPU, at batch 1 and 8.

python bench/generate.py MODEL_FOLDER [NEW_TOKENS]
"""

import sys
import time
from typing import Any

import torch

from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.run import CheckpointConfig, DataConfig, RunConfig
from megatron_sft.inference.generation import generate
from megatron_sft.inference.load import load_for_inference

QUESTIONS = [f"Tom has {n} apples and buys {n + 2} more. How many has he?" for n in range(3, 11)]


def main(folder: str, new_tokens: int) -> None:
    """Prints tokens/s of both, and their ratio, after one run of each to warm up."""
    from transformers import AutoModelForCausalLM

    run = RunConfig(checkpoint=CheckpointConfig(load=folder), data=DataConfig(tokenizer_model=folder))
    loaded = load_for_inference(run, frozenset())
    tokenizer = loaded.tokenizer
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    for batch_size in (1, 8):
        prompts = tokenizer(texts[:batch_size], add_special_tokens=False)["input_ids"]
        padded: Any = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        options = GenerateConfig(osl=new_tokens, batch_size=batch_size)
        seconds = []
        for _ in range(2):
            begin = time.monotonic()
            ours = generate(loaded.chunks, prompts, options, (), loaded.ranks)
            middle = time.monotonic()
            with torch.no_grad():
                theirs = reference.generate(**padded, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
            seconds = [middle - begin, time.monotonic() - middle]
        same = [answer.tokens for answer in ours] == theirs[:, padded["input_ids"].shape[1] :].tolist()
        speeds = [batch_size * new_tokens / s for s in seconds]
        print(
            f"batch {batch_size}: {speeds[0]:.1f} tokens/s, transformers {speeds[1]:.1f}, "
            f"ratio {speeds[0] / speeds[1]:.2f}, tokens equal: {same}"
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 32)
