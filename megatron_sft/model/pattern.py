"""What each layer of a model is: its kind, and what its attention sees. No torch.

Not here: which module stands where in a layer (specs.py).
"""

from megatron_sft.config.run import ModelConfig


def layer_kinds(model: ModelConfig) -> list[str]:
    """What each layer is made of: "*" attention, "-" MLP, "E" experts, "M" Mamba; "*-" is a transformer layer."""
    if model.mamba.hybrid_layer_pattern:
        return list(model.mamba.hybrid_layer_pattern)
    if not model.moe.num_moe_experts:
        return ["*-"] * model.num_layers
    return ["*E" if experts else "*-" for experts in layers_with_experts(model)]


def layers_with_experts(model: ModelConfig) -> list[bool]:
    """Per layer, of a model with experts: every n-th from the first, or a list."""
    frequency = model.moe.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % (frequency or 1) == 0 for layer in range(model.num_layers)]
    return [bool(value) for value in frequency]


def layers_without_rope(model: ModelConfig) -> list[bool]:
    """Per layer: queries and keys are not turned."""
    skipped = model.no_rope_freq
    if isinstance(skipped, int) and skipped:
        return [(layer + 1) % skipped == 0 for layer in range(model.num_layers)]
    return [bool(value) for value in skipped or [0] * model.num_layers]


def layer_window(model: ModelConfig, layer: int) -> int | None:
    """Window in tokens of a layer (0 is the first), None where it sees everything before it."""
    windowed = model.window_layers[layer] if model.window_layers else True
    return model.window_size if windowed else None


def layer_chunk(model: ModelConfig, layer: int) -> int | None:
    """Tokens of the pieces that a document is cut into for a layer (0 is the first), None where it is whole."""
    return None if layers_without_rope(model)[layer] else model.attention_chunk_size
