"""Hashes of what training, resume, conversion, export, generation and a task give, to compare two commits bit for bit.

    python tests/soak/golden.py --write FILE.json    on the commit before
    python tests/soak/golden.py --compare FILE.json  on the commit after; exits with 1 when something differs
    python tests/soak/golden.py                      this commit with itself, twice

The inputs are made by this file. Both runs must be on one machine: kernels differ between machines.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gloo import run_script
from tests.text_models import FAMILIES, SIZES, byte_tokenizer
from tests.unit.hf.tiny_models import tiny_folder

TRAINED = {
    "llama": {"model_type": "llama"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "head_dim": 16,
    },
}
LAYOUTS: dict[str, tuple[str, int, list[str]]] = {
    "one": ("llama", 1, []),
    "tp2": ("llama", 2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": ("llama", 2, ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
    "cp2": ("llama", 2, ["--context-parallel-size", "2"]),
    "dp2": ("llama", 2, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--bf16"]),
    "ep2": ("qwen3_moe", 2, ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]),
}
CONVERTED = ("gemma3_text", "gpt_oss", "deepseek_v3", "nemotron_h")


def digest(tensors: dict[str, Any]) -> str:
    """Of names, dtypes, shapes and bytes; what is no tensor is left out."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def checkpoint_digest(folder: Path) -> str:
    """Of every tensor of a torch_dist checkpoint, optimizer states included."""
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    wanted = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "properties")}
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    return digest(wanted)


def losses(save: Path) -> list[Any]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("iteration", "sft/loss", "grad_norm", "lr", "consumed_samples")] for line in lines]


def ran(script: str, flags: list[Any], processes: int = 1, statuses: tuple[int, ...] = (0,)) -> int:
    done = run_script(script, flags, processes, timeout_s=1800)
    assert done.returncode in statuses, f"{script} {flags}:\n{done.stdout}{done.stderr}"
    return done.returncode


def make_inputs(root: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, keys in TRAINED.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**SIZES, **FAMILIES["llama"], **keys}), dtype=torch.float32
        )
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    with (root / "rows.jsonl").open("w") as file:
        for number in range(23):
            question = f"What is {number} plus {number * 7 % 5}?" + " Tell me." * (number % 4)
            answer = f"It is {number + number * 7 % 5}." + " Really." * (number % 5)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    with (root / "mmlu.jsonl").open("w") as file:
        for split, number in [("dev", 0), ("dev", 1), *(("test", n) for n in range(6))]:
            row = {"subject": "law", "question": f"What is {number}?", "choices": list("wxyz"), "answer": number % 4}
            file.write(json.dumps({**row, "split": split}) + "\n")


def trained(root: Path, name: str) -> dict[str, Any]:
    """Four steps in a layout; the same in two halves; the second half on one process, from the first half's checkpoint."""
    model, processes, layout = LAYOUTS[name]
    base = ["--load", root / model, "--finetune-hf-dataset", root / "rows.jsonl", "--seq-length", "256", "--num-workers", "1"]
    base += ["--tokenizer-model", root / model, "--data-cache-path", root / "cache", "--global-batch-size", "4", "--lr", "1e-3"]
    base += ["--train-iters", "4", "--split", "90,10,0", "--eval-iters", "-1", "--eval-interval", "2", "--save-interval", "2"]
    whole, halves, moved = (root / f"{name}_{part}" for part in ("whole", "halves", "moved"))
    ran("finetune.py", [*base, *layout, "--save", whole, "--save-hf", root / f"{name}_hf"], processes)
    ran("finetune.py", [*base, *layout, "--save", halves, "--exit-interval", "2"], processes, (4,))
    ran("finetune.py", [*base, *layout, "--save", halves], processes)
    dtype = [flag for flag in layout if flag == "--bf16"]
    ran("finetune.py", [*base, *dtype, "--load", whole, "--finetune", "--save", moved])
    return {
        "losses": losses(whole),
        "checkpoint": checkpoint_digest(whole / "iter_0000004"),
        "hf": digest(load_file(root / f"{name}_hf" / "model.safetensors")),
        "resumed": [losses(halves), checkpoint_digest(halves / "iter_0000004")],
        "moved": losses(moved),
    }


def converted(root: Path, name: str) -> dict[str, Any]:
    """HF folder -> TP2 -> PP2 -> HF folder, and what verify says."""
    hf, tp2, pp2, back = (root / f"{part}_{name}" for part in ("hf", "tp2", "pp2", "back"))
    tiny_folder(name, hf, torch.bfloat16)
    script, bf16 = "megatron_sft/__main__.py", "--bf16"
    tensor_parallel = ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]  # gpt-oss' experts have biases
    ran(script, ["convert", "--load", hf, "--save", tp2, bf16, *tensor_parallel], 2)
    ran(script, ["convert", "--load", tp2, "--save", pp2, bf16, "--pipeline-model-parallel-size", "2"], 2)
    ran(script, ["export", "--load", pp2, "--save-hf", back, "--tokenizer-model", hf])
    verified = ran(script, ["verify", hf, pp2], 1, (0, 1))  # DeepSeek's router is fp32, which --bf16 rounds
    before, after = load_file(hf / "model.safetensors"), load_file(back / "model.safetensors")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in sorted(back.iterdir())}
    stored = [checkpoint_digest(root / "release") for root in (tp2, pp2)]
    return {"checkpoints": stored, "files": files, "changed": changed, "verify": verified}


def asked(root: Path) -> dict[str, Any]:
    """Answers and scores of the trained TP2 model, from its checkpoint and from its HF folder."""
    found = {}
    (root / "prompts.txt").write_text("Hello\nWhat is 3 plus 1?\n")
    for name, load in (("checkpoint", root / "tp2_whole"), ("hf", root / "tp2_hf")):
        output, scores = root / f"{name}.jsonl", root / f"{name}.json"
        ran("generate.py", ["--load", load, "--prompts-path", root / "prompts.txt", "--osl", "8", "--output", output])
        flags = ["mmlu", "--load", load, "--mmlu-dataset", root / "mmlu.jsonl", "--few-shots", "2", "--output", scores]
        ran("megatron_sft/__main__.py", flags)
        found[name] = [json.loads(line)["tokens"] for line in output.read_text().splitlines()]
        found[f"{name}_mmlu"] = {key: value for key, value in json.loads(scores.read_text()).items() if key != "load"}
    return found


def collect() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_inputs(root)
        found = {f"train {name}": trained(root, name) for name in LAYOUTS}
        found |= {f"convert {name}": converted(root, name) for name in CONVERTED}
        return {**found, "ask": asked(root)}


def main(argv: list[str]) -> int:
    before = json.loads(Path(argv[1]).read_text()) if argv[:1] == ["--compare"] else None
    found = json.loads(json.dumps(collect()))
    if argv[:1] == ["--write"]:
        Path(argv[1]).write_text(json.dumps(found, indent=1) + "\n")
        return 0
    before = json.loads(json.dumps(collect())) if before is None else before
    parts = [(name, part) for name in before for part in before[name]]
    changed = [f"{name}: {part}" for name, part in parts if found.get(name, {}).get(part) != before[name][part]]
    print("\n".join([*changed, f"{len(parts)} parts, {len(changed)} changed"]))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
