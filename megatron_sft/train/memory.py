"""How much memory a process has had at most; what a run that is out of it says. Not here: the forecast (plan.py)."""

import contextlib
import resource
from collections.abc import Iterator

import torch

from megatron_sft.config.run import RunConfig
from megatron_sft.errors import TrainingError
from megatron_sft.parallel import Ranks

_GIB = 2**30
_HOST_MESSAGES = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory")
"""How torch's CPU allocator, C++ and the operating system say it in a RuntimeError or OSError."""


def peak_bytes() -> int:
    """The most that this process has had so far: allocated on its GPU, or resident on the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def explained(run: RunConfig, ranks: Ranks) -> Iterator[None]:
    """Turns an out-of-memory error of the device or the host into a TrainingError that names what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated() / _GIB
        device = f"GPU {torch.cuda.current_device()} ({total / _GIB:.1f} GiB, {free / _GIB:.1f} free; our peak {peak:.1f})"
        raise TrainingError(_message(run, ranks, device, str(error))) from None
    except (MemoryError, RuntimeError, OSError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _HOST_MESSAGES):
            raise
        raise TrainingError(_message(run, ranks, "the host", str(error) or "MemoryError")) from None


def _message(run: RunConfig, ranks: Ranks, device: str, found: str) -> str:
    knobs = "; ".join(_knobs(run, ranks))
    return (
        f"rank {ranks.rank}: out of memory on {device}: {found.splitlines()[0][:300]} Expected the run to fit. What saves "
        f"memory, the cheapest first: {knobs}. `megatron-sft plan` with the same flags says which layouts fit."
    )


def _knobs(run: RunConfig, ranks: Ranks) -> list[str]:
    """Flags that would save memory in this run, with their values now."""
    train, layout = run.train, run.parallel
    knobs = []
    if train.max_tokens_per_gpu:
        knobs.append(f"lower --max-tokens-per-gpu (now {train.max_tokens_per_gpu})")
    else:
        knobs.append(f"lower --micro-batch-size (now {train.micro_batch_size}), or fill by --max-tokens-per-gpu")
    if train.recompute_granularity != "full":
        knobs.append("--recompute-granularity selective, or full with --recompute-method uniform --recompute-num-layers 1")
    if train.params_dtype == "fp32":
        knobs.append("--bf16")
    if not run.optim.use_precision_aware_optimizer:
        knobs.append("--use-precision-aware-optimizer with bf16 moments and gradients (12 bytes per parameter in place of 18)")
    if torch.cuda.is_available() and not run.optim.optimizer_cpu_offload:
        knobs.append("--optimizer-cpu-offload")
    if not layout.use_distributed_optimizer:
        knobs.append("--use-distributed-optimizer with more data-parallel processes")
    for name, flag in (("tensor", "--tensor-"), ("pipeline", "--pipeline-"), ("context", "--context-")):
        flag += "parallel-size" if name == "context" else "model-parallel-size"
        size = {"tensor": ranks.tp_size, "pipeline": ranks.pp_size, "context": ranks.cp_size}[name]
        knobs.append(f"raise {flag} (now {size})")
    knobs.append(f"lower --seq-length (now {run.data.seq_length})")
    return knobs
