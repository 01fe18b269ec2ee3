"""Flags whose value is not a field's: each sets one or several fields, some together with other flags.

Not here: flags that are fields (arguments.py), other spellings and constant values (flags.py).
"""

import ast
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sft.config.core_fields import MLAConfig
from megatron_sft.config.fields import Factor, kind_of, kinds
from megatron_sft.config.run import DataConfig, TrainConfig

Values = dict[str, Any]
"""Field path ("train.lr") -> value, of the flags that were given."""


MOST_LAYERS = 100_000
DATA_ENDINGS = tuple(
    f".{kind}{packed}" for kind in ("jsonl", "ndjson", "json", "parquet", "arrow") for packed in ("", ".gz", ".zst")
)
"""Of what is a file, not a name."""


def integers(text: str) -> list[int]:
    """A list of integers written with *, + and brackets: ([0]*1+[1]*2) -> [0, 1, 1]. Nothing else is evaluated.

    Raises:
        ValueError: it is none, or has more than MOST_LAYERS.
    """
    wrong = ValueError("not a list of integers such as ([0]*3+[1]*58)")

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= MOST_LAYERS:
            return node.value
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            times, part = sorted((value(node.left), value(node.right)), key=lambda side: isinstance(side, list))
            if isinstance(part, list) and isinstance(times, int) and len(part) * times <= MOST_LAYERS:
                return part * times
        raise wrong

    try:
        listed = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError):
        raise wrong from None
    if not isinstance(listed, list):
        raise wrong
    return listed


def _train_data(raw: Values, values: Values, problems: list[str]) -> None:
    """--finetune-hf-dataset, --finetune-data-files and --prompt-data all say what is trained on; the last kind counts."""
    for name in ("--finetune-hf-dataset", "--finetune-data-files", "--train-data"):
        if name in raw:
            values["data.train_data"] = tuple([raw[name]] if isinstance(raw[name], str) else raw[name])
    pairs = raw.get("--prompt-data")
    if pairs is None:
        return
    if len(pairs) == 1:
        values["data.train_data"] = tuple(pairs)
    elif len(pairs) % 2:
        problems.append(f"--prompt-data has {len(pairs)} words; expected one path, or NAME PATH pairs. Add the missing word.")
    else:
        values["data.train_names"], values["data.train_data"] = tuple(pairs[::2]), tuple(pairs[1::2])
        if files := [name for name in pairs[::2] if os.path.isfile(name) or name.endswith(DATA_ENDINGS)]:
            example = " ".join(f"{os.path.basename(path).partition('.')[0]} {path}" for path in pairs)
            problems.append(
                f"--prompt-data {' '.join(pairs)}: {', '.join(files)} stands where a name is expected: NAME PATH NAME PATH, or "
                f"one path. Write --prompt-data {example}, or --finetune-data-files {' '.join(pairs)} without names."
            )


def _split(raw: Values, values: Values, problems: list[str]) -> None:
    kind = kinds(DataConfig)["split"]
    try:
        shares = kind.read(raw["--split"].split(","))
    except ValueError:
        shares = ()
    if not 1 <= len(shares) <= 3 or not kind.has(shares):
        problems.append(f"--split {raw['--split']}: expected shares of training, validation and test such as 98,2,0. Correct it.")
        return
    values["data.split"] = (*shares, 0.0, 0.0)[:3]


def _rope_scaling(raw: Values, values: Values, problems: list[str]) -> None:
    """--use-rope-scaling: Llama 3's, with megatron-core's defaults for what --rope-scaling-factor leaves open."""
    factor, kind = raw.get("--rope-scaling-factor", "8"), kind_of(Factor)
    try:
        number = kind.read([factor])
    except ValueError:
        number = None
    if not kind.has(number):
        problems.append(f"--rope-scaling-factor {factor}: expected {kind.expected()}. Correct it.")
        return
    values["model.rope_scaling"] = {
        "rope_type": "llama3",
        "factor": number,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _rope_scaling_factor(raw: Values, values: Values, problems: list[str]) -> None:
    if "--use-rope-scaling" not in raw:
        problems.append("--rope-scaling-factor has no effect without --use-rope-scaling. Add it, or leave it out.")


def _any_rope_scaling(raw: Values, values: Values, problems: list[str]) -> None:
    """--rope-scaling: config.json's mapping as JSON, for the kinds that Megatron has no flags for."""
    text = raw["--rope-scaling"]
    try:
        scaling = json.loads(text)
    except (ValueError, RecursionError):
        scaling = None
    if not isinstance(scaling, dict) or "rope_type" not in scaling:
        problems.append(f'--rope-scaling {text}: expected JSON such as {{"rope_type": "linear", "factor": 8}}.')
        return
    values["model.rope_scaling"] = scaling


def _latent(raw: Values, values: Values, problems: list[str]) -> None:
    """Latent attention: YaRN where there is a factor."""
    given = {path.removeprefix("core."): value for path, value in values.items() if path.startswith("core.")}
    if given.get("rope_type", "yarn") != "yarn" or "rotary_scaling_factor" not in given:
        return
    defaults = {name: getattr(MLAConfig(), name) for name in ("original_max_position_embeddings", "mscale", "mscale_all_dim")}
    scaling = defaults | {name: given[name] for name in (*defaults, "beta_fast", "beta_slow") if name in given}
    values["model.rope_scaling"] = {"rope_type": "yarn", "factor": given["rotary_scaling_factor"], **scaling}


def _hybrid(raw: Values, values: Values, problems: list[str]) -> None:
    """One letter a layer: how many there are, and which have experts."""
    pattern = values.get("core.hybrid_layer_pattern", "")
    values.setdefault("model.num_layers", len(pattern))
    if "E" in pattern:
        values.setdefault("core.moe_layer_freq", [int(letter == "E") for letter in pattern])


def _window(raw: Values, values: Values, problems: list[str]) -> None:
    """--window-size LEFT,RIGHT counts neighbours: 127,0 is a window of 128 tokens."""
    left, _, right = raw["--window-size"].strip("()").partition(",")
    if not _is_count(left) or (right or "0").strip() != "0":
        problems.append(
            f"--window-size {raw['--window-size']}: expected LEFT,0 with LEFT earlier tokens, such as 127,0. Correct it."
        )
        return
    values["model.window_size"] = int(left) + 1


def _window_layers(raw: Values, values: Values, problems: list[str]) -> None:
    """Every n-th layer has full attention, or a list with 1 where a layer has a window."""
    text, layers = raw["--window-attn-skip-freq"], values.get("model.num_layers", 0)
    try:
        every = int(text) if _is_count(text) else None
        pattern = integers(text) if every is None else [(layer + 1) % every for layer in range(layers)]
    except (ValueError, ZeroDivisionError):
        problems.append(
            f"--window-attn-skip-freq {text}: expected N, every how many layers none has a window, or a list of 0 and 1."
        )
        return
    values["model.window_layers"] = tuple(bool(item) for item in pattern)


def _virtual_layers(raw: Values, values: Values, problems: list[str]) -> None:
    layers, stages = values.get("model.num_layers", 0), values.get("parallel.pipeline_model_parallel_size", 1)
    wanted = raw["--num-layers-per-virtual-pipeline-stage"]
    if not _is_count(wanted) or not int(wanted) or not layers or layers % (stages * int(wanted)):
        problems.append(
            f"--num-layers-per-virtual-pipeline-stage {wanted}: expected a number that divides {layers} layers over {stages} "
            "stages. Choose one that does, with --num-layers beside it."
        )
        return
    values["parallel.virtual_pipeline_model_parallel_size"] = layers // stages // int(wanted)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _hf_checkpoint(raw: Values, values: Values, problems: list[str]) -> None:
    """slime's --hf-checkpoint: tokenizer and config.json, and the weights where neither --load nor --ref-load is given."""
    values.setdefault("data.tokenizer_model", raw["--hf-checkpoint"])
    values.setdefault("checkpoint.load", raw.get("--ref-load", raw["--hf-checkpoint"]))


def _ref_load(raw: Values, values: Values, problems: list[str]) -> None:
    values.setdefault("checkpoint.load", raw["--ref-load"])


def _tokenizer_type(raw: Values, values: Values, problems: list[str]) -> None:
    kind = raw["--tokenizer-type"]
    if kind not in ("HuggingFaceTokenizer", "SentencePieceTokenizer", "SFTTokenizer"):
        problems.append(
            f"--tokenizer-type {kind}: expected HuggingFaceTokenizer or SentencePieceTokenizer. "
            "--tokenizer-model takes an HF folder, a hub name or a sentencepiece tokenizer.model."
        )


def _use_wandb(raw: Values, values: Values, problems: list[str]) -> None:
    if "--wandb-project" not in raw:
        problems.append("--use-wandb needs --wandb-project. Add it, or leave it out.")


def _dynamic_batch(raw: Values, values: Values, problems: list[str]) -> None:
    if "--max-tokens-per-gpu" not in raw:
        problems.append("--use-dynamic-batch-size needs --max-tokens-per-gpu. Add it, or leave it out.")


def _total_batch_size(raw: Values, values: Values, problems: list[str]) -> None:
    """nanochat's tokens per step -> packs of --seq-length tokens."""
    text, length = raw["--total-batch-size"], values.get("data.seq_length", DataConfig.seq_length)
    if not _is_count(text) or not int(text) or int(text) % length:
        problems.append(
            f"--total-batch-size {text}: expected tokens of a step, a multiple of --seq-length {length}. Correct it, or give "
            "--global-batch-size in packs."
        )
        return
    packs = int(text) // length
    if values.setdefault("train.global_batch_size", packs) != packs:
        problems.append(
            f"--total-batch-size {text} makes {packs} packs per step, --global-batch-size "
            f"{values['train.global_batch_size']}. Expected one number. Leave one out."
        )


def _decoupled_lr(raw: Values, values: Values, problems: list[str]) -> None:
    """Megatron's --decoupled-lr and --decoupled-min-lr, of input and output layer: the last entry of --param-groups.

    Their lowest rate is --min-lr, as in megatron-core (optimizer/__init__.py:get_standard_config_overrides).
    """
    if "--decoupled-lr" not in raw:
        problems.append("--decoupled-min-lr has no effect without --decoupled-lr. Add it, or leave it out.")
        return
    settings = f"lr={raw['--decoupled-lr']}"
    least = raw.get("--decoupled-min-lr", values.get("optim.min_lr"))
    if least is not None:
        settings += f" min_lr={least}"
    entry = rf"^(embedding|output_layer)\. {settings}"
    entries = values.get("optim.param_groups", ())
    values["optim.param_groups"] = entries if entry in entries else (*entries, entry)


def _loss_type(raw: Values, values: Values, problems: list[str]) -> None:
    """--loss-type, with slime's word for cross-entropy."""
    word, kind = raw["--loss-type"], kinds(TrainConfig)["loss_type"]
    word = "sft" if word == "sft_loss" else word
    if word == "asft":
        problems.append(
            "--loss-type asft: it anchors to a second, frozen copy of the weights, which this project does not hold beside the "
            "model. Use dft, which is asft without the anchor, with fewer steps or a lower --lr."
        )
    elif not kind.has(word):
        problems.append(f"--loss-type {word}: expected {kind.expected()}. Correct it.")
    else:
        values["train.loss_type"] = word


@dataclass(frozen=True)
class Derived:
    """A flag that sets fields together with others, or that checks what they say."""

    read: Callable[[Values, Values, list[str]], None] | None = None
    """(words by flag, field values so far, problems so far) -> None: adds to the last two."""
    sets: str = ""
    """The field that it is a spelling of."""
    words: int | str = 1
    help: str = ""
    """Empty: the flag stands in another table too."""
    group: str = ""
    """Section that it stands with in --help."""
    unit: str = ""
    default: str = "none"


DERIVED: Mapping[str, Derived] = {
    "--finetune-hf-dataset": Derived(_train_data, help="what to train on: file, folder or hub name", group="data", unit="place"),
    "--finetune-data-files": Derived(_train_data, words="+", help="files to train on", group="data", unit="file"),
    "--train-data": Derived(_train_data, words="+", help="files, folders or hub names to train on", group="data", unit="place"),
    "--prompt-data": Derived(_train_data, words="+", help="one path, or NAME PATH pairs: a mixture", group="data", unit="place"),
    "--split": Derived(_split, help="rows for training, validation and test", group="data", unit="shares", default="100,0,0"),
    "--use-rope-scaling": Derived(
        _rope_scaling, "model.rope_scaling", 0, "RoPE scaling of Llama 3", group="model", default="off"
    ),
    "--rope-scaling-factor": Derived(_rope_scaling_factor, help="its factor", group="model", unit="number", default="8"),
    "--rope-scaling": Derived(
        _any_rope_scaling,
        "model.rope_scaling",
        help="RoPE scaling of any kind: config.json's mapping as JSON",
        group="model",
        unit="JSON",
    ),
    "--multi-latent-attention": Derived(_latent),
    "--hybrid-layer-pattern": Derived(_hybrid),
    "--hybrid-override-pattern": Derived(_hybrid),
    "--window-size": Derived(
        _window, "model.window_size", help="sliding window attention over LEFT earlier tokens", group="model", unit="LEFT,0"
    ),
    "--window-attn-skip-freq": Derived(
        _window_layers, "model.window_layers", help="which layers have the window", group="model", unit="layers"
    ),
    "--num-layers-per-virtual-pipeline-stage": Derived(
        _virtual_layers, help="layers per model chunk", group="parallel", unit="layers"
    ),
    "--hf-checkpoint": Derived(_hf_checkpoint, help="HF folder of tokenizer and weights", group="checkpoint", unit="folder"),
    "--ref-load": Derived(_ref_load, help="weights to start from", group="checkpoint", unit="place"),
    "--use-wandb": Derived(_use_wandb, words=0, help="Weights & Biases, with --wandb-project", group="log", default="off"),
    "--use-dynamic-batch-size": Derived(
        _dynamic_batch, words=0, help="micro-batches are filled to --max-tokens-per-gpu", group="train", default="off"
    ),
    "--tokenizer-type": Derived(
        _tokenizer_type,
        help="HuggingFaceTokenizer or SentencePieceTokenizer",
        group="data",
        unit="name",
        default="what the folder has",
    ),
    "--total-batch-size": Derived(_total_batch_size, help="what a step takes", group="train", unit="tokens"),
    "--decoupled-lr": Derived(_decoupled_lr, help="lr of embeddings and head", group="optim", unit="number"),
    "--decoupled-min-lr": Derived(_decoupled_lr, help="their min_lr", group="optim", unit="number"),
    "--loss-type": Derived(
        _loss_type,
        "train.loss_type",
        help="what a trained token costs: sft (or sft_loss), dft or eaft",
        group="train",
        unit="word",
        default="sft",
    ),
}
"""In this order, after all flags that are fields."""
