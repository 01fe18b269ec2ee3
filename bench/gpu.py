"""Training throughput on one GPU: ours, TRL with packing, TRL with packing and Liger; useful tokens/s, MFU, peak memory.

    python bench/gpu.py --out gpu.json [--budget-seconds 400] [--shapes Qwen3-0.6B,Qwen3-8B] [--engines ours,loss,trl,liger]
    python bench/gpu.py --out gpu.json --cpu

Shapes come from conf/Qwen; weights are random, documents have the lengths of ShareGPT's chats, packed to 4,096 tokens,
16,384 tokens per step, every token trained. A cell is a process of its own, given its share of the budget; one that does not
fit is tried with smaller micro-batches, then with full recomputation, and is a row all the same. Useful tokens are those
that are no padding, FLOPs those of attention within documents (model/flops.py). The floor is the time that an H200 needs
at the least (its derivation: docs/gpu.md). --cpu: a tiny shape through the same code. bench/gpu.sh runs this after tests/gpu.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu_cells import FITS, SHAPES, SWITCHES, Sizes, run_config, squares_of  # noqa: E402

START_UP_S, GRACE_S = 15.0, 40.0
"""Of a cell's share of the budget, what is not for steps; what it may take beyond its share before it is ended."""
ENGINES = ("ours", "loss", "trl", "liger")


def floor_tokens_per_s(model: Any, squared_over_tokens: float) -> float:
    """Tokens/s that an H200 cannot exceed (docs/gpu.md).

    Matrix products at 790 TFLOP/s (measured, random data), flash attention forward at 667 and backward at 450 with 2.5
    times the operations, element-wise work at 4.3 TB/s (measured copy, bytes read and written). The optimizer is not in it.

    Args:
        model: ModelConfig of a dense model with a gated MLP.
        squared_over_tokens: sum of squared document lengths / sum of lengths.
    """
    h, f, layers, d = model.hidden_size, model.ffn_hidden_size, model.num_layers, model.kv_channels
    heads, groups = model.num_attention_heads, model.num_query_groups
    products = layers * (h * (heads + 2 * groups) * d + heads * d * h + 3 * h * f) + model.padded_vocab_size * h
    attention = 2 * layers * heads * d * squared_over_tokens
    elementwise = 3 * layers * (8 * h + 2 * (heads + groups) * d + 3 * f) * 2
    return 1 / (6 * products / 790e12 + attention / 667e12 + 2.5 * attention / 450e12 + elementwise / 4.3e12)


def attempt(options: argparse.Namespace, cell: Sequence[Any], until: float) -> dict[str, Any]:
    """Runs one cell in a process; a row with a status, whatever happens in it."""
    command = [sys.executable, "-m", "bench.gpu_cells", json.dumps(cell), "--until", str(until)]
    command += ["--trl-attention", options.trl_attention]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTORCH_ALLOC_CONF"] = f"expandable_segments:{'fixed-segments' not in cell[4]}"
    if options.trl_folder:
        environment["PYTHONPATH"] = os.pathsep.join([options.trl_folder, environment.get("PYTHONPATH", "")])
    if options.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    limit = until - time.time() + GRACE_S
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        try:
            status = subprocess.run(command, stdout=output, stderr=errors, env=environment, cwd=ROOT, timeout=limit).returncode
            ending = f"failed ({status})"
        except subprocess.TimeoutExpired:
            ending = f"no end within {limit:.0f} s"
        output.seek(0)
        errors.seek(0)
        results = [line for line in output if line.startswith("RESULT ")]
        lines = errors.read().strip().splitlines() or ["no message"]
    if results:
        return {"status": "ok", **json.loads(results[-1].removeprefix("RESULT ")), "wall_s": time.monotonic() - start}
    text = "\n".join(lines[-40:])
    if "OutOfMemoryError" in text or "out of memory" in text:
        return {"status": "out of memory"}
    return {"status": f"{ending}: {lines[-1][:300]}", "stderr": text}


def row_of(options: argparse.Namespace, shape: str, engine: str, until: float) -> dict[str, Any]:
    """The cell's row: the first setting of FITS that fits; time may run out before one does."""
    tried: list[list[Any]] = []
    for packs, recompute in FITS[SHAPES[shape].first :]:
        row = attempt(options, (shape, engine, packs, recompute, options.switches), until)
        tried.append([packs, recompute, row["status"]])
        if row["status"] != "out of memory":
            break
        until = max(until, time.time() + START_UP_S)
    named = {"shape": shape, "engine": engine, "packs_per_micro_batch": packs, "recompute": recompute}
    return {**named, **row, "tried": tried}


def cell_row(shape: str, engine: str, until: float, packs: int, switches: Sequence[str]) -> dict[str, Any]:
    """A row without a table. packs: packs a micro-batch; 0: the first setting of FITS that fits."""
    options = argparse.Namespace(trl_attention="sdpa", trl_folder=None, cpu=False, switches=list(switches))
    if packs:
        return attempt(options, (shape, engine, packs, False, options.switches), until)
    return row_of(options, shape, engine, until)


def judged(row: dict[str, Any], device: dict[str, Any]) -> dict[str, Any]:
    """The row with its FLOPs, MFU and share of the floor."""
    from megatron_sft.model.flops import train_flops

    if row["status"] != "ok" or row["engine"] == "loss":
        return row
    model, squares = run_config(row["shape"], 1, False).model, squares_of(Sizes.of(row["shape"]))
    lengths = Sizes.of(row["shape"]).lengths()
    tflops = train_flops(model, lengths, int(lengths.sum())) / lengths.sum() * row["tokens_per_s"] / 1e12
    row |= {"tflops": tflops, "mfu": tflops / device["matmul_tflops"], "squared_over_tokens": squares}
    bar = SHAPES[row["shape"]].share
    if "H200" in device["name"] and bar is not None:
        floor = floor_tokens_per_s(model, squares)
        share = row["tokens_per_s"] / floor
        row |= {"floor_tokens_per_s": floor, "share_of_floor": share, "bar": bar, "passes": share >= bar}
    return row


def line_of(row: dict[str, Any]) -> str:
    setting = f"micro-batch {row['packs_per_micro_batch']}{' recompute' * row['recompute']}"
    name = f"{row['shape']:<11} {row['engine']:<6} {setting:<23}"
    if row["status"] != "ok":
        return f"{name} {row['status']}"
    if row["engine"] == "loss":
        return loss_line(row)
    text = f"{name} {row['tokens_per_s']:>9,.0f} tok/s  MFU {row['mfu']:6.1%}  {row['peak_gib']:6.1f} GiB"
    if "passes" not in row:
        return f"{text}  no floor for this device"
    verdict = "pass" if row["passes"] else "FAIL"
    return f"{text}  {row['share_of_floor']:.0%} of the floor {row['floor_tokens_per_s']:,.0f} (bar {row['bar']:.0%}): {verdict}"


def loss_line(row: dict[str, Any]) -> str:
    times = f"fused {row['fused_ms']:.1f} ms, full logits {row['full_ms']:.1f}, bare products {row['products_ms']:.1f}"
    text = f"{row['shape']:<11} head and loss of {row['tokens']:,} tokens: {times}"
    if "peak_share" not in row:
        return text
    verdict = "pass" if row["passes"] else "FAIL"
    return f"{text}; peak {row['peak_share']:.0%} of full logits' (bar {row['bar']:.0%}): {verdict}"


def ratios(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Ours beside each peer, by shape."""
    rate = {(row["shape"], row["engine"]): row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    for (shape, engine), value in rate.items():
        if engine != "ours" and (shape, "ours") in rate:
            yield f"{shape:<11} ours / {engine}: {rate[shape, 'ours'] / value:.2f}x"


def versions() -> dict[str, str | None]:
    names = ("torch", "megatron-core", "transformers", "triton", "trl", "liger-kernel", "transformer-engine", "flash-attn")
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def engines_of(options: argparse.Namespace) -> list[str]:
    """The engines asked for; of peers only those that are installed, unless they are named."""
    if options.engines:
        return list(options.engines.split(","))
    if options.cpu:
        return ["ours", "loss"]
    has_trl, has_liger = (importlib.util.find_spec(name) is not None for name in ("trl", "liger_kernel"))
    return ["ours", "loss"] + ["trl"] * has_trl + ["liger"] * (has_trl and has_liger)


def counted(log: str) -> dict[str, Any]:
    """Tests of what `pytest -v` printed, by outcome; "unfinished": the one during which it was ended."""
    found = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE)
    outcomes = [outcome.lower() for _, outcome in found]
    counts: dict[str, Any] = {name: outcomes.count(name) for name in ("passed", "failed", "error", "skipped")}
    last = log.rstrip().rpartition("\n")[2]
    counts["not_passed"] = [name for name, outcome in found if outcome in ("FAILED", "ERROR")]
    return {**counts, "unfinished": last if re.fullmatch(r"\S+::\S+", last) else ""}


def table(options: argparse.Namespace) -> int:
    """Runs every cell, prints its line, writes the JSON file after each; 1 where a row of ours failed."""
    deadline = time.time() + options.budget_seconds
    out = Path(options.out)
    shapes = options.shapes.split(",") if options.shapes else ["tiny"] if options.cpu else [s for s in SHAPES if SHAPES[s].share]
    cells = [(shape, engine) for engine in engines_of(options) for shape in (shapes[:1] if engine == "loss" else shapes)]
    device = attempt(options, ("", "device", 1, False, []), time.time() + 60)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "versions": versions(),
        "device": device,
        "budget_seconds": options.budget_seconds,
        "tests": {"status": options.tests_status, **counted(Path(options.tests or os.devnull).read_text())},
        "rows": [],
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    figures = "{matmul_tflops:.1f} TFLOP/s in bf16 products, {copy_gb_per_s:,.0f} GB/s copied (bytes read and written)"
    print(f"{device['name']}: {figures.format(**device)}" if device["status"] == "ok" else f"the device: {device}", flush=True)
    for number, (shape, engine) in enumerate(cells):
        share = (deadline - time.time()) / (len(cells) - number)
        row = row_of(options, shape, engine, time.time() + max(5.0, share - START_UP_S))
        report["rows"].append(judged(row, device) if device["status"] == "ok" else row)
        print(line_of(row), flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(*ratios(report["rows"]), sep="\n")
    return int(any(row["status"] != "ok" and row["engine"] in ("ours", "loss") for row in report["rows"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file")
    parser.add_argument("--budget-seconds", type=float, default=400.0, help="divided over the cells")
    parser.add_argument("--shapes", help=f"of {','.join(SHAPES)}; default: the four Qwen3, with --cpu tiny")
    parser.add_argument("--engines", help=f"of {','.join(ENGINES)}; default: those that are installed, with --cpu ours")
    parser.add_argument("--trl-attention", default="sdpa", help="attn_implementation of TRL's model")
    parser.add_argument("--trl-folder", help="made by pip install --no-deps --target FOLDER trl accelerate")
    parser.add_argument("--cpu", action="store_true", help="no GPU is used, also where there is one")
    parser.add_argument("--switches", nargs="+", default=[], choices=SWITCHES, help="for ours: left out or put in")
    parser.add_argument("--tests", help="what pytest -v printed for tests/gpu, for the JSON file")
    parser.add_argument("--tests-status", type=int, help="exit status of tests/gpu, for the JSON file")
    return table(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
