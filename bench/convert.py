"""Speed and peak memory of HF -> model -> HF on one process, and of the commands `convert` and `export`.

    python bench/convert.py [GIGABYTES]

Prints each figure beside its bar. Load and save: GB/s in a fresh process with the file warm in the page cache. Beside the
save stands the kernel's own speed, a copy of the same file with fsync in the same process: on a machine with other work both
fall together. Peak RSS: of that process, bar largest shard x 1.3 + 1 GB. convert and export: whole commands in that process,
without the comparison with transformers. The model's memory is written once before the clock starts, and that time is
printed too: a virtual machine that gets its memory page by page needs up to three seconds for a gigabyte that nobody has
used yet, whoever asks for it. For the same reason write to a disk: in /dev/shm the file itself is such memory.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BAR = 0.5
"""GB/s that load and save must reach."""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def write_random(folder: Path, gigabytes: float) -> None:
    """A Llama of about that many bytes in bf16, in one shard."""
    import torch
    from safetensors.torch import save_file

    hidden, ffn, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"q": (hidden, hidden), "k": (512, hidden), "v": (512, hidden), "o": (hidden, hidden)}
    per_layer = sum(a * b for a, b in shapes.values()) + 3 * hidden * ffn
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocab * hidden) / per_layer))
    weights = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    weights["model.norm.weight"] = (hidden,)
    for number in range(layers):
        stem = f"model.layers.{number}."
        weights |= {f"{stem}self_attn.{name}_proj.weight": shape for name, shape in shapes.items()}
        weights |= {f"{stem}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        weights[f"{stem}mlp.down_proj.weight"] = (hidden, ffn)
        weights |= {f"{stem}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    tensors = {name: torch.rand(shape).to(torch.bfloat16) for name, shape in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def measure(source: Path, target: Path) -> dict[str, float]:
    """Loads and saves once in this process, then runs both commands."""
    import torch

    from megatron_sft import conversion, parallel
    from megatron_sft.config.run import CheckpointConfig, DataConfig, ParallelConfig, RunConfig, TrainConfig
    from megatron_sft.hf.config import model_config_from_hf, read_hf_config
    from megatron_sft.hf.exporter import save_hf
    from megatron_sft.hf.weights import load_hf_weights
    from megatron_sft.model.build import build_model
    from megatron_sft.weights import padded

    clock = Clock()
    model = padded(model_config_from_hf(read_hf_config(source)), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    ranks, train = parallel.initialize(ParallelConfig(), 1), TrainConfig(params_dtype="bf16")
    chunks = build_model(model, ParallelConfig(), train)
    start = time.perf_counter()
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.zero_()
    memory_s = time.perf_counter() - start
    with clock("load"):
        load_hf_weights(chunks, model, source, ranks)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with clock("save"):
        save_hf(chunks, model, target, ranks, source)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with clock("copy"):
        copy_with_fsync(source / "model.safetensors", target.with_name("copy"))
    parallel.finalize()
    del chunks
    megatron = target.with_name("megatron")
    with clock("convert"):
        places = CheckpointConfig(load=str(source), save=str(megatron), verify_conversion=False)
        conversion.convert(RunConfig(train=train, checkpoint=places))
    with clock("export"):
        places = CheckpointConfig(load=str(megatron), save_hf=str(target))
        conversion.export(RunConfig(data=DataConfig(tokenizer_model=str(source)), checkpoint=places))
    return {**clock.found, "memory_s": memory_s, "base_gb": before, "load_gb": loaded, "peak_gb": peak}


class Clock:
    """with clock("load"): ... -> found["load_s"] and found["load_cpu_s"], which counts the kernel's work too."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block."""
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.found |= {f"{name}_s": time.perf_counter() - start, f"{name}_cpu_s": time.process_time() - cpu}


def copy_with_fsync(source: Path, target: Path) -> None:
    """What the kernel alone needs for these bytes."""
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    target.unlink()


def main() -> None:
    """Writes the checkpoint, measures in a fresh process, prints one line a figure."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.2
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "in", Path(place) / "out"
        source.mkdir()
        write = [sys.executable, __file__, "--write", str(source), str(gigabytes)]
        subprocess.run(write, check=True)
        run = [sys.executable, __file__, "--measure", str(source), str(target)]
        output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        size = (source / "model.safetensors").stat().st_size / 1e9
    bars = {"load": BAR, "save": BAR, "copy": None, "convert": None, "export": None}
    print(f"{size:.2f} GB bf16 in {place}, load average {os.getloadavg()[0]:.1f}")
    for name, bar in bars.items():
        speed = size / found[f"{name}_s"]
        verdict = "" if bar is None else f" (bar {bar} GB/s: {'kept' if speed >= bar else 'missed'})"
        print(f"{name:8} {speed:5.2f} GB/s, {size / found[f'{name}_cpu_s']:5.2f} GB a CPU second{verdict}")
    for name in ("load", "peak"):
        used, bar = found[f"{name}_gb"], size * 1.3 + 1
        print(f"{name:8} {used:5.2f} GB of memory at most (bar {bar:.2f} GB: {'kept' if used <= bar else 'missed'})")
    print(f"memory   {found['memory_s']:5.2f} s for the first use of the model's; libraries {found['base_gb']:.2f} GB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_random(Path(sys.argv[2]), float(sys.argv[3]))
    elif sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
