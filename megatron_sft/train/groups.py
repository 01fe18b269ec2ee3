"""Which parameter belongs to which group of the run's table, in megatron-core's words. Not here: the table (config/groups.py)."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch.nn import Parameter

from megatron_sft.checkpoint.state import unwrap
from megatron_sft.config.groups import ParameterGroup, parameter_groups
from megatron_sft.config.run import OptimConfig
from megatron_sft.errors import ConfigError
from megatron_sft.parallel import gather

LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
EXPERT = re.compile(r"\.local_experts\.\d+\.")


def named_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, Parameter]]:
    """Parameters of this process's chunks that are trained, layers counted over the whole model from 0."""
    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            local = LOCAL_LAYER.match(name)
            if local:
                name = f"decoder.layers.{chunk.decoder.layers[int(local[1])].layer_number - 1}.{local[2]}"
            if name.startswith("output_layer.") and getattr(parameter, "shared_embedding", False):
                name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied table
            if parameter.requires_grad:
                yield name, parameter


def kind_of(name: str, parameter: Parameter) -> str:
    """embedding (a tied table too), unembedding, matrix (every other weight of two dimensions) or other, by its whole name."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "unembedding"
    return "matrix" if parameter.dim() == 2 else "other"


def config_overrides(chunks: Sequence[Any], optim: OptimConfig) -> dict[ParamKey, Any] | None:
    """Collective: megatron-core's config_overrides for the run's table; None without one: its own rule for weight decay.

    Every parameter has the overrides of one group. megatron-core tells groups apart by wd_mult, lr_mult and two more when it
    loads a state dict (optimizer.py:param_group_identifier_keys) and does nothing else with lr_mult: it numbers the groups here.

    Raises:
        ConfigError: on every process, for an entry of the table or a rate that no parameter has, or that only some experts of a
            layer have: their numbers are a process's own, and all of them are one tensor of a checkpoint.
    """
    groups = parameter_groups(optim)
    if not groups:
        return None
    members: dict[int, tuple[int, bool, str]] = {}
    of_experts: dict[str, set[int]] = {}
    for name, parameter in named_parameters(chunks):
        kind = kind_of(name, parameter)
        place = next(index for index, group in enumerate(groups) if _has(group, name, kind))
        decays = groups[place].decays_all or not (parameter.dim() == 1 or name.endswith(".bias"))
        members[id(parameter)] = place, decays, _method(groups[place], kind, optim)
        if EXPERT.search(name):
            of_experts.setdefault(EXPERT.sub(".", name), set()).add(place)
    said = [bool(group.pattern) or getattr(optim, f"{group.label}_lr", None) is not None for group in groups]
    _require_whole(groups, said, {place for place, _, _ in members.values()}, list(of_experts.values()))
    keys = {}
    for place, group in enumerate(groups):
        for kind, decays in itertools.product(("matrix", "other"), (True, False)):
            method = _method(group, kind, optim)
            if kind == "matrix" and not method.startswith("muon"):
                continue
            mark = place, decays, method
            predicate = ParamWithNamePredicate(str(mark), lambda parameter, name, mark=mark: members.get(id(parameter)) == mark)
            keys[ParamKey(with_name_predicate=predicate)] = {
                "max_lr": group.lr,
                "min_lr": group.min_lr,
                "start_wd": group.weight_decay,
                "end_wd": group.weight_decay,
                "wd_mult": float(decays),
                "lr_mult": 1.0 + 2 * place + (kind == "matrix"),
                "label": group.label,
                "method": method,
                "momentum": optim.muon_momentum if method.startswith("muon") else optim.sgd_momentum,
            }
    return keys


def _require_whole(
    groups: Sequence[ParameterGroup], said: Sequence[bool], mine: set[int], of_experts: Sequence[set[int]]
) -> None:
    """Collective: refuses groups without a parameter, and those that part a layer's experts.

    Args:
        groups: of the table.
        said: whether a flag asks for a group, which then must have a parameter.
        mine: places of those that parameters of this process are in.
        of_experts: for a weight of a layer's experts, those that it is in.
    """
    split = {min(places) for places in of_experts if len(places) > 1}
    everyone = gather((mine, split))
    used, parted = (set().union(*sets) for sets in zip(*everyone, strict=True))
    problems = [
        f"{group.pattern or f'--{group.label}-lr'}: no trained parameter has it that an earlier group leaves. Expected one. "
        "Correct it, or leave it out."
        for place, group in enumerate(groups)
        if said[place] and place not in used
    ]
    problems += [
        f"{groups[place].pattern}: some experts of a layer have it, others do not. Expected all or none. Leave the expert's "
        "number out."
        for place in sorted(parted)
    ]
    if problems:
        raise ConfigError(problems)


def _method(group: ParameterGroup, kind: str, optim: OptimConfig) -> str:
    """How a parameter of a group is updated; what is no matrix, or is an embedding or a head, is Adam's in a group of Muon."""
    if group.optimizer != "muon":
        return group.optimizer
    return f"muon-{optim.muon_variant}" if kind == "matrix" else "adam"


def _has(group: ParameterGroup, name: str, kind: str) -> bool:
    return bool(re.search(group.pattern, name)) if group.pattern else group.label in (kind, "other")
