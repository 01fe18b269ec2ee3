"""Plants mistakes that adapters have had elsewhere, one at a time, and shows that the comparison with one process finds each.

    python tests/soak/lora_mistakes.py [WORD ...]    words choose mistakes

The cases and what is compared are those of tests/distributed/test_lora.py.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.lora_rig import ALONE, CASES, Case, faults, folders, same_alone, train_cases
from tests.gloo import run_ranks


def _after_init(change: Callable[[Any], None]) -> Callable[[], None]:
    """Changes every adapter when it has been made."""

    def plant() -> None:
        from megatron_sft.model.lora import Adapter

        made = Adapter.__init__

        def changed(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            change(self)

        Adapter.__init__ = changed  # type: ignore[method-assign]

    return plant


def _marks(name: str, value: Any) -> Callable[[], None]:
    return _after_init(lambda adapter: [setattr(parameter, name, value) for parameter in adapter.parameters()] and None)


def _replace(name: str, value: Any) -> Callable[[], None]:
    """Another function where model/lora.py looks one up."""

    def plant() -> None:
        from megatron_sft.model import lora

        setattr(lora, name, value)

    return plant


def _method(name: str, value: Any) -> Callable[[], None]:
    def plant() -> None:
        from megatron_sft.model.lora import Adapter

        setattr(Adapter, name, value)

    return plant


def _by_rank() -> None:
    import torch.distributed as dist

    from megatron_sft.model.lora import Adapter

    draw = Adapter.draw
    Adapter.draw = lambda self, how, seed: draw(self, how, seed + dist.get_rank())  # type: ignore[method-assign]


def _not_frozen() -> None:
    import megatron_sft.hf.adapters as adapters

    adapters.freeze = lambda chunks, run, ranks: None  # type: ignore[assignment]


def _hook_last() -> None:
    from megatron_sft.model import lora

    def add(base: Any, place: Any, settings: Any) -> Any:
        adapter = lora.Adapter(base, place, settings)
        base.add_module(lora.NAME, adapter)
        base.register_forward_hook(lora._add)
        return adapter

    import megatron_sft.hf.adapters as adapters

    adapters.add_adapter = add


def _local_norm() -> None:
    import megatron_sft.model.lora as lora

    lora.dist = type("Dist", (), {"all_reduce": staticmethod(lambda *args, **kwargs: None), "get_rank": lora.dist.get_rank})


def _bias_moves() -> None:
    import megatron_sft.hf.adapters as adapters

    freeze = adapters.freeze

    def frozen(chunks: Any, run: Any, ranks: Any) -> None:
        freeze(chunks, run, ranks)
        for router in (part for chunk in chunks for part in chunk.modules() if hasattr(part, "expert_bias")):
            router.frozen_expert_bias = False

    adapters.freeze = frozen


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


MISTAKES: dict[str, tuple[str, Callable[[], None]]] = {
    "replicas not summed under sequence parallelism": ("tp2-sp", _marks("sequence_parallel", False)),
    "replicas in experts not summed over ETP": ("moe-tp2-sp-etp2", _method("_summed", lambda self, x, whole: x)),
    "experts reduced over the dense group": ("moe-ep2", _marks("allreduce", True)),
    "replicas in experts counted twice": ("moe-tp2-sp-etp2", _marks("shared", False)),
    "gradient of A x not summed over TP": ("tp2", _replace("copy_to_tensor_model_parallel_region", _same)),
    "A x not reduced": ("tp2", _replace("reduce_from_tensor_model_parallel_region", _same)),
    "A x counted as many times as there are ranks": (
        "tp2",
        _replace("reduce_from_tensor_model_parallel_region", lambda x, group: _doubled(x, group)),
    ),
    "rows of B in the order of q, k, v": ("cp2", _after_init(lambda adapter: setattr(adapter, "order", None))),
    "A drawn by rank": ("dp2-distopt", _by_rank),
    "everything trained": ("tp2-sp", _not_frozen),
    "adapter after the gathered latents": ("mla-tp2-sp", _hook_last),
    "adapter after the norm": ("norm-after-tp2-sp", _hook_last),
    "norm of a part of a row": ("dora-tp2", _local_norm),
    "expert bias moves": ("mla-ep2", _bias_moves),
}


def _doubled(x: Any, group: Any) -> Any:
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    return reduce_from_tensor_model_parallel_region(x, group=group) * 2


def with_mistake(name: str, cases: dict[str, Case], hf: dict[str, str]) -> Any:
    """The outcomes, or the name of what was raised."""
    MISTAKES[name][1]()
    try:
        return train_cases(cases, hf)
    except (AssertionError, RuntimeError) as error:
        return type(error).__name__


def main(words: list[str]) -> int:
    """Prints how each mistake shows; 1 where one does not."""
    with tempfile.TemporaryDirectory() as root:
        hf = folders(Path(root))
        chosen = [name for name in MISTAKES if not words or any(word in name for word in words)]
        needed = {name: ALONE[name] for name in (same_alone(CASES[MISTAKES[name][0]]) for name in chosen)}
        alone = run_ranks(train_cases, 1, needed, hf, timeout_s=500)[0]
        found = {}
        for name in chosen:
            case = CASES[MISTAKES[name][0]]
            ranks = run_ranks(with_mistake, 2, name, {"case": case}, hf, timeout_s=300)
            raised = [rank for rank in ranks if isinstance(rank, str)]
            found[name] = raised or faults([rank["case"] for rank in ranks], alone[same_alone(case)])
            print(f"{name:50} {'; '.join(found[name]) or 'NOT FOUND'}", flush=True)
    print(f"{sum(map(bool, found.values()))} of {len(found)} mistakes found")
    return int(not all(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
