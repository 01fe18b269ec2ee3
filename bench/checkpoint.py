"""Checkpoint speed on this machine: ours beside torch's distributed checkpoint, sync and async.

    python bench/checkpoint.py [--gigabytes 1.2] [--folder FOLDER] [--runs 3]

Prints a table and one JSON line. The stall of an asynchronous save is the time that `save` takes plus what the next
optimizer step waits for the copy, with a forward and backward pass of --pass-s seconds between them (slept, so that the
copy does not compete with it); the rate counts bytes in the checkpoint.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of weights and optimizer states")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--pass-s", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(Path(folder), options)
    print(f"{'':28}{'median':>9}{'min':>9}{'max':>9}")
    for name, values in rows.items():
        print(f"{name:28}{statistics.median(values):9.3f}{min(values):9.3f}{max(values):9.3f}")
    print(json.dumps({name: statistics.median(values) for name, values in rows.items()}))


def measure(root: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    from megatron_sft.checkpoint import manifest
    from megatron_sft.checkpoint.distributed import CheckpointSaver, load_checkpoint
    from megatron_sft.config.run import CheckpointConfig, ParallelConfig
    from tests.distributed.checkpoint_rig import build

    width = max(64, int((options.gigabytes * 1e9 / 12 / 4 / 14) ** 0.5) // 64 * 64)
    rig = build(
        ParallelConfig(),
        hidden_size=width,
        ffn_hidden_size=3 * width,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=width // 4,
        padded_vocab_size=1024,
    )
    rig.train(1, 1)
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    for asynchronous in (False, True):
        run = rig.run.__class__(**{**rig.run.__dict__, "checkpoint": CheckpointConfig(async_save=asynchronous)})
        saver = CheckpointSaver(root / str(asynchronous), run, rig.ranks)
        for number in range(1, options.runs + 2):
            started = time.perf_counter()
            saver.save(number, rig.chunks, rig.optimizer, rig.scheduler, {})
            stall = time.perf_counter() - started
            if asynchronous:
                time.sleep(options.pass_s)
                waiting = time.perf_counter()
                saver._pending._wait_for_copy()
                stall += time.perf_counter() - waiting
            saver.finish()
            folder = saver.root / f"iter_{number:07d}"
            size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
            if number > 1:  # the first makes the staging buffers and warms the page cache
                add(
                    "ours async stall s" if asynchronous else "ours sync save GB/s",
                    stall if asynchronous else size / stall,
                )
                if not asynchronous:
                    add("ours sync save s", stall)
            if number < options.runs + 1 or asynchronous:
                shutil.rmtree(folder)
    for _ in range(options.runs):
        started = time.perf_counter()
        assert not manifest.problems(root / "False" / f"iter_{options.runs + 1:07d}", content=True)
        add("verify GB/s", size / (time.perf_counter() - started))
        started = time.perf_counter()
        load_checkpoint(root / "False", rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)
        add("ours verified load GB/s", size / (time.perf_counter() - started))
        add("torch DCP save GB/s", size / _torch_save(root, rig))
    rows["GB"] = [size]
    rows["async stall / sync save"] = [
        statistics.median(rows["ours async stall s"]) / statistics.median(rows["ours sync save s"])
    ]
    return rows


def _torch_save(root: Path, rig: object) -> float:
    """Seconds of torch.distributed.checkpoint.save of the same tensors, with its defaults."""
    from torch.distributed import checkpoint as dcp

    shutil.rmtree(root / "dcp", ignore_errors=True)
    state = rig.weights()
    started = time.perf_counter()
    dcp.save(state, checkpoint_id=root / "dcp")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
