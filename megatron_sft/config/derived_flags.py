"""Flags whose value is not a field's: each sets one or several fields, some together with other flags.

Not here: flags that are fields (arguments.py), other spellings and constant values (flags.py).
"""

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any

Values = dict[str, Any]
"""Field path ("train.lr") -> value, of the flags that were given."""


def integers(text: str) -> list[int]:
    """A list of integers written with *, + and brackets: ([0]*1+[1]*2) -> [0, 1, 1]. Nothing else is evaluated."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError("not a list of integers such as ([0]*3+[1]*58)") from None

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value < 10_000:
            return node.value
        if isinstance(node, ast.List):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return value(node.left) * value(node.right)
        raise ValueError("not a list of integers such as ([0]*3+[1]*58)")

    return value(tree)


def _train_data(raw: Values, values: Values, found: list[str]) -> None:
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
        found.append(f"--prompt-data has {len(pairs)} words; expected one path, or NAME PATH pairs. Add the missing word.")
    else:
        values["data.train_names"], values["data.train_data"] = tuple(pairs[::2]), tuple(pairs[1::2])


def _split(raw: Values, values: Values, found: list[str]) -> None:
    try:
        shares = [float(part) for part in raw["--split"].split(",")]
        if len(shares) > 3:
            raise ValueError
        values["data.split"] = tuple([*shares, 0.0, 0.0][:3])
    except ValueError:
        found.append(f"--split {raw['--split']}: expected shares of training, validation and test such as 98,2,0.")


def _rope_scaling(raw: Values, values: Values, found: list[str]) -> None:
    """--use-rope-scaling: Llama 3's, with megatron-core's defaults for what --rope-scaling-factor leaves open."""
    if "--use-rope-scaling" not in raw:
        return
    values["model.rope_scaling"] = {
        "rope_type": "llama3",
        "factor": float(raw.get("--rope-scaling-factor", 8.0)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _any_rope_scaling(raw: Values, values: Values, found: list[str]) -> None:
    """--rope-scaling: config.json's mapping as JSON, for the kinds that Megatron has no flags for."""
    text = raw["--rope-scaling"]
    try:
        scaling = json.loads(text)
    except json.JSONDecodeError:
        scaling = None
    if not isinstance(scaling, dict) or "rope_type" not in scaling:
        found.append(f'--rope-scaling {text}: expected JSON such as {{"rope_type": "linear", "factor": 8}}.')
        return
    values["model.rope_scaling"] = scaling


def _latent(raw: Values, values: Values, found: list[str]) -> None:
    """Latent attention in Megatron-LM's words: no --q-lora-rank, no compression of queries; YaRN where there is a factor."""
    values.setdefault("core.q_lora_rank", None)  # MLATransformerConfig's own default is 512
    given = {path.removeprefix("core."): value for path, value in values.items() if path.startswith("core.")}
    if given.get("rope_type", "yarn") != "yarn" or "rotary_scaling_factor" not in given:
        return
    defaults = {"original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.0}  # MLATransformerConfig's
    scaling = defaults | {name: given[name] for name in (*defaults, "beta_fast", "beta_slow") if name in given}
    values["model.rope_scaling"] = {"rope_type": "yarn", "factor": given["rotary_scaling_factor"], **scaling}


def _hybrid(raw: Values, values: Values, found: list[str]) -> None:
    """One letter a layer: how many there are, and which have experts."""
    pattern = values.get("core.hybrid_layer_pattern", "")
    values.setdefault("model.num_layers", len(pattern))
    if "E" in pattern:
        values.setdefault("core.moe_layer_freq", [int(letter == "E") for letter in pattern])


def _window(raw: Values, values: Values, found: list[str]) -> None:
    """--window-size LEFT,RIGHT counts neighbours: 127,0 is a window of 128 tokens."""
    try:
        left, _, right = raw["--window-size"].strip("()").partition(",")
        if int(right or 0) != 0:
            raise ValueError
        values["model.window_size"] = int(left) + 1
    except ValueError:
        found.append(f"--window-size {raw['--window-size']}: expected LEFT,0 with LEFT earlier tokens, such as 127,0.")


def _window_layers(raw: Values, values: Values, found: list[str]) -> None:
    """Every n-th layer has full attention, or a list with 1 where a layer has a window."""
    text, layers = raw["--window-attn-skip-freq"], values.get("model.num_layers", 0)
    try:
        pattern = [int((layer + 1) % int(text) != 0) for layer in range(layers)] if text.isdigit() else integers(text)
    except ValueError as error:
        found.append(f"--window-attn-skip-freq {text}: {error}.")
        return
    values["model.window_layers"] = tuple(bool(item) for item in pattern)


def _virtual_layers(raw: Values, values: Values, found: list[str]) -> None:
    layers, stages = values.get("model.num_layers", 0), values.get("parallel.pipeline_model_parallel_size", 1)
    wanted = raw["--num-layers-per-virtual-pipeline-stage"]
    if not wanted.isdigit() or not int(wanted) or layers % (stages * int(wanted)):
        found.append(f"--num-layers-per-virtual-pipeline-stage {wanted}: does not divide {layers} layers over {stages} stages.")
        return
    values["parallel.virtual_pipeline_model_parallel_size"] = layers // stages // int(wanted)


def _hf_checkpoint(raw: Values, values: Values, found: list[str]) -> None:
    """slime's --hf-checkpoint: tokenizer and config.json, and the weights where neither --load nor --ref-load is given."""
    values.setdefault("data.tokenizer_model", raw["--hf-checkpoint"])
    values.setdefault("checkpoint.load", raw.get("--ref-load", raw["--hf-checkpoint"]))


def _ref_load(raw: Values, values: Values, found: list[str]) -> None:
    values.setdefault("checkpoint.load", raw["--ref-load"])


def _tokenizer_type(raw: Values, values: Values, found: list[str]) -> None:
    kind = raw["--tokenizer-type"]
    if kind not in ("HuggingFaceTokenizer", "SentencePieceTokenizer", "SFTTokenizer"):
        found.append(
            f"--tokenizer-type {kind}: expected HuggingFaceTokenizer or SentencePieceTokenizer. "
            "--tokenizer-model takes an HF folder, a hub name or a sentencepiece tokenizer.model."
        )


_Derive = Callable[[Values, Values, list[str]], None]
DERIVED: Mapping[str, _Derive] = {
    "--finetune-hf-dataset": _train_data,
    "--finetune-data-files": _train_data,
    "--train-data": _train_data,
    "--prompt-data": _train_data,
    "--split": _split,
    "--use-rope-scaling": _rope_scaling,
    "--rope-scaling": _any_rope_scaling,
    "--multi-latent-attention": _latent,
    "--hybrid-layer-pattern": _hybrid,
    "--hybrid-override-pattern": _hybrid,
    "--window-size": _window,
    "--window-attn-skip-freq": _window_layers,
    "--num-layers-per-virtual-pipeline-stage": _virtual_layers,
    "--hf-checkpoint": _hf_checkpoint,
    "--ref-load": _ref_load,
    "--tokenizer-type": _tokenizer_type,
}
DERIVED_HELP: Mapping[str, tuple[Any, str]] = {
    "--finetune-hf-dataset": (None, "what to train on: file, folder or hub name"),
    "--finetune-data-files": ("+", "files to train on"),
    "--train-data": ("+", "files, folders or hub names to train on"),
    "--prompt-data": ("+", "one path, or NAME PATH pairs: a mixture"),
    "--split": (None, "shares of rows for training, validation and test"),
    "--use-rope-scaling": (0, "RoPE scaling of Llama 3"),
    "--rope-scaling-factor": (None, "its factor"),
    "--rope-scaling": (None, "RoPE scaling of any kind: config.json's mapping as JSON"),
    "--window-size": (None, "LEFT,0: sliding window attention"),
    "--window-attn-skip-freq": (None, "which layers have the window"),
    "--num-layers-per-virtual-pipeline-stage": (None, "layers a model chunk"),
    "--hf-checkpoint": (None, "HF folder of tokenizer and weights"),
    "--ref-load": (None, "weights to start from"),
    "--tokenizer-type": (None, "HuggingFaceTokenizer or SentencePieceTokenizer"),
}
"""Flag -> (nargs, help) of the flags that set fields together with others."""
