"""What an asynchronous save needs: copies of live tensors, taken while training goes on, and talk between threads.

Weights and optimizer states change in optimizer.step() and nowhere else. So the copy is made by a thread during the
next forward and backward pass, and the step waits for it (a hook on the torch optimizers). Training stands still only
where the copy takes longer than the two passes. Buffers of the model, which a forward pass may change, are copied at once.
"""

import os
import pickle
import time
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from megatron_sft.checkpoint.state import unwrap
from megatron_sft.checkpoint.torch_dist import WriteJob

_POLL_S = 0.005


class Staging:
    """Copies of tensors in host memory, kept from save to save (fresh pages cost more than the copy)."""

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}

    def copy(self, items: list[tuple[WriteItem, Any]], ready: Any) -> list[tuple[WriteItem, Any]]:
        """Copies every tensor to its buffer; returns when the copies are whole.

        Args:
            items: of a WriteJob.
            ready: CUDA event after which the tensors hold what is to be saved; None on the CPU.
        """
        if ready is None:
            return [(item, self._copied(item, data)) for item, data in items]
        stream = torch.cuda.Stream()
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            copied = [(item, self._copied(item, data)) for item, data in items]
        stream.synchronize()
        return copied

    def _copied(self, item: WriteItem, data: Any) -> Any:
        if not isinstance(data, torch.Tensor):
            return data
        buffer = self._buffers.get(item.index)
        if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
            buffer = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=data.is_cuda)
            self._buffers[item.index] = buffer
        return buffer.copy_(data.detach(), non_blocking=True)


def detach_buffers(job: WriteJob, chunks: list[Any]) -> None:
    """Copies the tensors of a job that are buffers of the model: a forward pass may change them."""
    live = {buffer.untyped_storage().data_ptr() for chunk in chunks for buffer in unwrap(chunk).buffers()}
    job.items = [
        (item, data.clone() if isinstance(data, torch.Tensor) and data.untyped_storage().data_ptr() in live else data)
        for item, data in job.items
    ]


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside megatron-core's; none on a process without trainable parameters."""
    parts = [getattr(part, "optimizer", None) for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [part for part in parts if part is not None]


class StoreExchange:
    """parallel.gather for threads: through the key-value store of the process group, which needs no turn-taking.

    Args:
        name: the same on every process and new in every save.
        timeout_s: how long a process may be waited for.
    """

    def __init__(self, name: str, rank: int, world_size: int, timeout_s: float):
        self._store = dist.distributed_c10d._get_default_store()
        self._name, self._rank, self._world_size, self._timeout_s = name, rank, world_size, timeout_s
        self._turn = 0

    def __call__(self, value: Any) -> list[Any]:
        keys = [f"checkpoint/{self._name}/{self._turn}/{rank}" for rank in range(self._world_size)]
        self._turn += 1
        self._store.set(keys[self._rank], pickle.dumps(value))  # type: ignore[arg-type]  # bytes are right
        deadline = time.monotonic() + self._timeout_s
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise TimeoutError(f"ranks {missing} did not answer in {self._timeout_s:.0f} s")
            time.sleep(_POLL_S)
        return [pickle.loads(self._store.get(key)) for key in keys]

    def forget(self) -> None:
        """Removes this process's messages; only when every process has read them."""
        for turn in range(self._turn):
            self._store.delete_key(f"checkpoint/{self._name}/{turn}/{self._rank}")


class Outcome:
    """Context of a thread's work: whatever is raised in it is kept, to be raised again where the work is waited for."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self._error = error
        return True

    def raise_again(self) -> None:
        if self._error is not None:
            raise self._error


def writer_threads(world_size: int) -> int:
    """Writing threads of one process: enough to hide checksums behind the disk, at most its share of cores."""
    local = min(world_size, torch.cuda.device_count()) if torch.cuda.is_available() else world_size
    return max(1, min(4, (os.cpu_count() or 1) // local))
