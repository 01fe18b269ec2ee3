"""parallel.gather and parallel.agree: every process learns the same, errors of one included."""

from megatron_sft import parallel
from megatron_sft.config.run import ParallelConfig
from megatron_sft.errors import ConfigError, DataError
from tests.gloo import run_ranks


def _fails(rank: int) -> int:
    if rank == 1:
        raise ConfigError(["first problem.", "second problem."])
    if rank == 2:
        raise DataError("another")
    return rank


def _together() -> tuple[list[int], int, str, str]:
    from megatron.core import parallel_state

    ranks = parallel.initialize(ParallelConfig(tensor_model_parallel_size=3), 1)
    everyone = parallel.gather(ranks.rank)
    assert parallel.gather("alone", parallel_state.get_data_parallel_group()) == ["alone"]
    own = parallel.agree(lambda: ranks.rank * 10)
    try:
        parallel.agree(lambda: _fails(ranks.rank))
    except (ConfigError, DataError) as error:
        return everyone, own, type(error).__name__, str(error)
    raise AssertionError("no error")


def test_every_process_gets_the_values_and_the_first_error() -> None:
    message = "2 problems in the configuration:\n  - first problem.\n  - second problem."
    assert run_ranks(_together, 3) == [([0, 1, 2], rank * 10, "ConfigError", message) for rank in range(3)]


def test_a_process_alone_needs_no_group() -> None:
    assert parallel.gather(7) == [7] and parallel.agree(lambda: 8) == 8
