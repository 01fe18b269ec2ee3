"""LoRA beside full fine-tuning of one HF folder on a CPU: peak memory and processor time of a step, each in a process of its own.

python bench/lora.py demo/SmolLM2-135M-Instruct [--rank 16 --steps 3 --tokens 512]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measured(folder: str, rank: int, steps: int, tokens: int) -> dict[str, float]:
    """Trains `steps` steps of one pack of random tokens after one that is not counted."""
    import torch

    from megatron_sft.checkpoint.background import torch_optimizers
    from megatron_sft.config.run import CheckpointConfig, LoraConfig, OptimConfig, RunConfig, TrainConfig
    from megatron_sft.data.loader import TrainLoader
    from megatron_sft.data.packing import PackPlan
    from megatron_sft.data.sft_dataset import SFTDataset
    from megatron_sft.data.store import MemoryStore
    from megatron_sft.parallel import initialize
    from megatron_sft.train.optim import build_optimizer, wrap_ddp
    from megatron_sft.train.step import train_step
    from megatron_sft.weights import build, resolve

    torch.set_num_threads(1)
    run = RunConfig(
        train=TrainConfig(global_batch_size=1, train_iters=steps + 1),
        optim=OptimConfig(lr=1e-4),
        checkpoint=CheckpointConfig(load=folder, verify_conversion=False),
        lora=LoraConfig(lora_rank=rank),
    )
    run, source = resolve(run, frozenset(), training=False)
    ranks = initialize(run.parallel, 1)
    import numpy as np

    random = np.random.default_rng(0)
    rows = [
        (random.integers(3, run.model.vocab_size, tokens).astype(np.int32), np.ones(tokens, np.uint8)) for _ in range(steps + 1)
    ]
    plan = PackPlan(np.arange(steps + 1), np.arange(steps + 2))
    loader = TrainLoader(SFTDataset(MemoryStore(rows), plan, tokens, 0), run.train, shuffle=False, prefetch=0)
    chunks = wrap_ddp(build(run, source, ranks), run.parallel)
    optimizer = build_optimizer(chunks, run)
    times = []
    for step in loader:
        begin = time.process_time()
        train_step(chunks, optimizer, step.micro_batches, 1, str)
        times.append(time.process_time() - begin)
    trained = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
    states = sum(
        t.nbytes
        for part in torch_optimizers(optimizer)
        for state in part.state.values()
        for t in state.values()
        if torch.is_tensor(t)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"step_cpu_s": sorted(times[1:])[len(times[1:]) // 2], "peak_gb": peak, "trained": trained, "state_bytes": states}


def main() -> int:
    """Prints both and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--measure", action="store_true", help="this process alone, as JSON")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(given.folder, given.rank, given.steps, given.tokens)))
        return 0
    found = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shared = ["--steps", str(given.steps), "--tokens", str(given.tokens), "--measure"]
    for rank in (0, given.rank):
        command = [sys.executable, __file__, given.folder, "--rank", str(rank), *shared]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"rank {rank:3}: " + ", ".join(f"{name} {value:,.3f}" for name, value in found[-1].items()), flush=True)
    print(", ".join(f"{name} {found[1][name] / found[0][name]:.1%}" for name in ("peak_gb", "step_cpu_s", "trained")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
