"""Speed and peak memory of HF -> model -> HF on one process.

    python bench/convert.py [GIGABYTES]

Prints bytes / second each way, in a fresh process with the file warm in the page cache, and the peak RSS of that process
next to the bar: largest shard x 1.3 + 1 GB above the interpreter with its libraries. The model's memory is written once
before the clock starts, and that time is printed beside: a virtual machine that gets its memory page by page needs up to
three seconds for a gigabyte that nobody has used yet, whoever asks for it. For the same reason write to a disk: in
/dev/shm the file itself is such memory.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    """Loads and saves once in this process."""
    import torch

    from megatron_sft import conversion
    from megatron_sft.checkpoint.hf import load_hf_weights, save_hf
    from megatron_sft.checkpoint.hf_config import model_config_from_hf, read_hf_config
    from megatron_sft.config import ParallelConfig

    model = conversion.padded(model_config_from_hf(read_hf_config(source)), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    chunks, ranks = conversion.built(model, ParallelConfig(), "bf16")
    start = time.perf_counter()
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.zero_()
    memory_s = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    load_hf_weights(chunks, model, source, ranks)
    load_s, load_cpu_s = time.perf_counter() - start, time.process_time() - cpu
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    start, cpu = time.perf_counter(), time.process_time()
    save_hf(chunks, model, target, ranks, source)
    save_s, save_cpu_s = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    times = {"memory_s": memory_s, "load_s": load_s, "save_s": save_s, "load_cpu_s": load_cpu_s, "save_cpu_s": save_cpu_s}
    return {**times, "base_gb": before, "load_gb": loaded, "peak_gb": peak}


def main() -> None:
    """Writes the checkpoint, measures in a fresh process, prints one line."""
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
    print(
        f"{size:.2f} GB bf16: load {size / found['load_s']:.2f} GB/s, save {size / found['save_s']:.2f} GB/s with fsync "
        f"({size / found['load_cpu_s']:.2f} and {size / found['save_cpu_s']:.2f} GB per CPU second), "
        f"first use of the model's memory {found['memory_s']:.2f} s, peak RSS {found['load_gb']:.2f} GB loading, "
        f"{found['peak_gb']:.2f} GB in all, bar {size * 1.3 + 1:.2f} GB ({found['base_gb']:.2f} GB of it the libraries)"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_random(Path(sys.argv[2]), float(sys.argv[3]))
    elif sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
