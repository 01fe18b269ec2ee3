"""Process groups, ranks and seeds. The only writer of megatron-core's parallel_state.

Everybody else receives `Ranks`, frozen integers; code that needs a group asks megatron-core for it by name.
"""

import contextlib
import datetime
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_sft.config.run import ParallelConfig
from megatron_sft.core_compat import install_cpu_mode
from megatron_sft.environment import process_environment
from megatron_sft.errors import ConfigError, UserError

T = TypeVar("T")
TELL_S = 20
"""For the other processes to hear why one ends."""
WAYS_OUT: Mapping[str, str] = {
    "EADDRINUSE": "Expected a free port. Choose another MASTER_PORT (--master-port), or end the process that has it.",
    "Too many open files": "Expected room for a socket a process and group. Raise the limit: ulimit -n 65536.",
    "Unable to find": "Expected a network interface, if only loopback: ip link set lo up, or name one in GLOO_SOCKET_IFNAME.",
    "": "Expected machines that reach each other. Check MASTER_ADDR, MASTER_PORT, firewalls, and that all were started.",
}
"""By what the error says."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in every direction of parallelism. Sizes count processes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0


def initialize(parallel: ParallelConfig, seed: int) -> Ranks:
    """Joins the other processes, makes megatron-core's groups and seeds every generator.

    Args:
        parallel: the layout; problems.py has checked that it fits the world size.
        seed: the run's seed; tensor-parallel and pipeline ranks derive theirs from it as Megatron-LM does.

    Raises:
        ConfigError: the processes cannot reach each other.
        UserError: what another process has found before it came here.
    """
    install_cpu_mode()
    rank, world_size, local_rank = process_environment()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    backend = parallel.distributed_backend or ("nccl" if cuda else "gloo")
    if backend == "nccl" and not cuda:
        raise ConfigError(["--distributed-backend nccl: there is no CUDA device. Expected gloo; leave the flag out."])
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    with _explained(f"rank {rank} of {world_size}"):
        if not dist.is_initialized():
            # one process: no launcher, no port is taken
            store = dist.HashStore() if world_size == 1 else _meet(None, rank, world_size, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        _make_groups(parallel)
    ranks = _ranks(rank, world_size, local_rank)
    _seed(seed, ranks)
    return ranks


def _meet(own: UserError | None, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """Joins the other processes' key-value store; the error of one is raised on all. They meet here once.

    Args:
        own: what this process has found, which ends it.
        rank: of this process.
        world_size: processes.
        timeout: for the others to come here.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store = dist.PrefixStore("start", store)
    store.set_timeout(timeout)
    _put(store, f"error/{rank}", own)
    if rank == 0:
        errors = [_taken(store, f"error/{other}") for other in range(world_size)]
        _put(store, "found", next(((other, error) for other, error in enumerate(errors) if error), (0, None)))
    origin, found = _taken(store, "found")
    store.set(f"seen/{rank}", "")
    if found is None:
        return dist.PrefixStore("run", store)
    if rank == 0:  # may hold the store, where the others look
        store.wait([f"seen/{other}" for other in range(world_size)], datetime.timedelta(seconds=TELL_S))
    if origin:
        found.args = (f"rank {origin}: {found}",)
    found.is_said = rank != 0
    raise found


def _put(store: dist.Store, key: str, value: Any) -> None:
    store.set(key, pickle.dumps(value).hex())


def _taken(store: dist.Store, key: str) -> Any:
    """The value, once somebody has put it there."""
    return pickle.loads(bytes.fromhex(store.get(key).decode()))


def tell_others(error: UserError) -> bool:
    """Says why this process ends to those that come to `initialize`, so that they end too.

    Returns:
        Whether rank 0 has found the same, or says it for this one.
    """
    rank, world_size, _ = process_environment()
    if dist.is_initialized():
        return False
    try:
        _meet(error, rank, world_size, datetime.timedelta(seconds=TELL_S))
    except UserError as found:
        return str(found).endswith(str(error))
    except (RuntimeError, ValueError, OSError):  # nobody is there
        return False
    return False


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """What torch and gloo raise when processes cannot connect, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        way_out = next((text for name, text in WAYS_OUT.items() if name in reason), WAYS_OUT[""])
        raise ConfigError([f"{where}: the processes cannot be connected ({reason}). {way_out}"]) from None


@contextlib.contextmanager
def imagined(parallel: ParallelConfig, world_size: int, rank: int = 0) -> Iterator[None]:
    """The groups of one rank among processes that are not there: for models on the meta device. Nothing can be sent.

    Args:
        parallel: the layout.
        world_size: processes that it is cut over.
        rank: which of them.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    install_cpu_mode()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        _make_groups(parallel, gloo=False)
        yield
    finally:
        finalize()


def _make_groups(parallel: ParallelConfig, gloo: bool = True) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=gloo,
    )


def _ranks(rank: int, world_size: int, local_rank: int) -> Ranks:
    from megatron.core import parallel_state as ps

    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=ps.get_tensor_model_parallel_world_size(),
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=ps.get_pipeline_model_parallel_world_size(),
        cp_rank=ps.get_context_parallel_rank(),
        cp_size=ps.get_context_parallel_world_size(),
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        ep_rank=ps.get_expert_model_parallel_rank(),
        ep_size=ps.get_expert_model_parallel_world_size(),
    )


def _seed(seed: int, ranks: Ranks) -> None:
    """Seeds Python, numpy, torch and megatron-core (megatron/training/initialize.py: +100 a stage)."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed + 100 * ranks.pp_rank)
    np.random.seed(seed + 100 * ranks.pp_rank)
    torch.manual_seed(seed + 100 * ranks.pp_rank)
    model_parallel_cuda_manual_seed(seed + 100 * ranks.pp_rank)


def gather(value: T, group: Any = None) -> list[T]:
    """Collective: the value of every process, by rank; [value] in a process that joined no others.

    Args:
        value: anything that pickle takes.
        group: process group; None: all processes.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(name: str, make: Callable[[], T]) -> T:
    """Collective: what rank 0 makes, for which the others wait however long that takes, as for a person who types.

    Args:
        name: of this value in the run's key-value store, once.
        make: called on rank 0 alone; its value is pickled.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    store: Any = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        _put(store, name, make())
    store.wait([name], datetime.timedelta(days=365))
    return _taken(store, name)  # type: ignore[no-any-return]


def agree(action: Callable[[], T], exchange: Callable[[Any], list[Any]] = gather) -> T:
    """Collective: runs `action` on every process, and fails on all when it fails on one: nobody waits for one that left.

    Args:
        action: what this process does; it waits for no other.
        exchange: gather, or what does the same in a thread.

    Returns:
        This process's result.

    Raises:
        UserError: on every process, that of the lowest rank which met one.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    failures = [error for error in exchange(failure) if error is not None]
    if failures:
        failures[0].is_said = dist.is_initialized() and dist.get_rank() != 0
        raise failures[0]
    return result  # type: ignore[return-value]  # None only where action gave it


def finalize() -> None:
    """Leaves every group. Safe to call when nothing was initialized."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
