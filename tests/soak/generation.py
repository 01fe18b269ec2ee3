"""Greedy text against transformers', fp32: every tiny family and SmolLM2, alone, in ragged batches, cut over ranks.

python tests/soak/generation.py [PROMPTS] [NEW_TOKENS] [PIECE ...]      8 prompts x 16 tokens of SmolLM2; the whole size is 32 64

Pieces: "tiny", "alone" and the names of SMOLLM2; without any, all of them. PROMPTS may be 8:16, the second eight.
Prints a line a layout and model; the exit status is 1 where a token differs.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gloo import ROOT, run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2, SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
SMOLLM2: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP3": {"tensor_model_parallel_size": 3},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP3, SP": {"tensor_model_parallel_size": 3, "sequence_parallel": True},
}
"""Its 9 heads in 3 groups have no half."""
TINY_PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [60, 61, 62], [99], [30, 31, 32, 33, 34, 35, 36]]
TINY_TOKENS = 10


def answers(folders: list[str], layout: dict[str, Any], prompts: list[list[int]], new_tokens: int, sizes: list[int]) -> list:
    """Of each folder's model the answers at each batch size; on every rank."""
    from megatron_sft.core_compat import install_cpu_mode

    install_cpu_mode()
    from megatron_sft import parallel
    from megatron_sft.config.options import GenerateConfig
    from megatron_sft.config.run import CheckpointConfig, ParallelConfig, RunConfig
    from megatron_sft.inference.generation import generate
    from megatron_sft.weights import build, resolve

    cut = ParallelConfig(**layout)
    ranks, found = parallel.initialize(cut, 1), []
    for folder in folders:
        wanted = RunConfig(parallel=cut, checkpoint=CheckpointConfig(load=folder, verify_conversion=False))
        run, source = resolve(wanted, frozenset(), training=False)
        chunks = build(run, source, ranks)
        runs = [generate(chunks, prompts, GenerateConfig(osl=new_tokens, batch_size=size), (), ranks) for size in sizes]
        found.append([[answer.tokens for answer in run] for run in runs])
    return found


def expected(folder: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """transformers' own, one prompt after the other."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.text_models import greedy

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return [greedy(model, prompt, new_tokens, []) for prompt in prompts]


def tiny_families(root: Path) -> dict[str, str]:
    """Folders of all of tests/unit/hf/tiny_models.py, by name."""
    from tests.unit.hf.tiny_models import KEYS, tiny_folder

    for name in KEYS:
        (root / name).mkdir()
        tiny_folder(name, root / name)
    return {name: str(root / name) for name in KEYS}


def smollm2_prompts(folder: str, first: int, last: int) -> list[list[int]]:
    """Questions of examples/data/gsm8k_train_400.jsonl through the chat template, of other lengths each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (ROOT / "examples/data/gsm8k_train_400.jsonl").read_text().splitlines()[first:last]]
    texts = [
        tokenizer.apply_chat_template(
            [turn for turn in row["messages"] if turn["role"] != "assistant"], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def compare(
    models: dict[str, str],
    prompts: list[list[int]],
    new_tokens: int,
    wanted: dict[str, list],
    sizes: list[int],
    layouts: dict[str, dict[str, Any]],
) -> int:
    """Prints a line a layout; returns how many answers differ."""
    bad = 0
    for name, layout in layouts.items():
        begin = time.monotonic()
        arguments = list(models.values()), layout, prompts, new_tokens, sizes
        world_size = math.prod(size for name, size in layout.items() if name.endswith("_size"))
        found = run_ranks(answers, world_size, *arguments, timeout_s=3000)
        differ = [
            f"{model}, batch {size}, prompt {number}"
            for rank in found
            for model, runs in zip(models, rank, strict=True)
            for size, run in zip(sizes, runs, strict=True)
            for number, (ours, theirs) in enumerate(zip(run, wanted[model], strict=True))
            if ours != theirs
        ]
        total = len(models) * len(prompts) * len(sizes)
        print(
            f"{name}: {len(models)} models, {len(prompts)} prompts x {new_tokens} tokens, batches of {sizes}: "
            f"{total * len(found) - len(differ)} of {total * len(found)} answers identical, {time.monotonic() - begin:.0f} s"
            f"{'; ' if differ else ''}{'; '.join(differ[:6])}",
            flush=True,
        )
        bad += len(differ)
    return bad


def main(which: str = "8", new_tokens: str = "16", *pieces: str) -> int:
    """The exit status."""
    first, _, last = which.rpartition(":")
    bad, layouts = 0, {name: layout for name, layout in SMOLLM2.items() if not pieces or name in pieces}
    if not pieces or "tiny" in pieces:
        with tempfile.TemporaryDirectory() as root:
            tiny = tiny_families(Path(root))
            wanted = {name: expected(folder, TINY_PROMPTS, TINY_TOKENS) for name, folder in tiny.items()}
            bad += compare(tiny, TINY_PROMPTS, TINY_TOKENS, wanted, [1, 4], LAYOUTS)
    folder = str(ROOT / "demo/SmolLM2-135M-Instruct")
    if (Path(folder) / "config.json").exists() and pieces != ("tiny",):
        prompts = smollm2_prompts(folder, int(first or 0), int(last))
        print(f"SmolLM2: prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens", flush=True)
        wanted = {"SmolLM2": expected(folder, prompts, int(new_tokens))}
        bad += compare({"SmolLM2": folder}, prompts, int(new_tokens), wanted, [16], layouts)
        if not pieces or "alone" in pieces:
            some = prompts if pieces else prompts[: max(2, len(prompts) // 4)]
            alone = run_ranks(answers, 1, [folder], {}, some, int(new_tokens), [1], timeout_s=3000)[0][0][0]
            same = alone == wanted["SmolLM2"][: len(alone)]
            print(f"one process, batches of 1, {len(alone)} prompts: {'identical' if same else 'DIFFERENT'}", flush=True)
            bad += not same
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
