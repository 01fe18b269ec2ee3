"""parallel.gather and parallel.agree: every process learns the same, errors of one included. Other data on one are an error."""

import socket
from pathlib import Path

import pytest

from megatron_sft import parallel
from megatron_sft.config.run import DataConfig, ParallelConfig
from megatron_sft.data.sources import open_source
from megatron_sft.data.tokens import build_token_store
from megatron_sft.errors import ConfigError, DataError
from megatron_sft.train.setup import _require_same_on_all
from tests.gloo import run_ranks
from tests.unit.data.test_tokens import chat, make_word_encoder, write


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


def _opens_its_own_rows(folder: str) -> str:
    rank = parallel.initialize(ParallelConfig(), 1).rank
    path = Path(folder, str(rank), "rows.jsonl")
    path.parent.mkdir()
    config = DataConfig(seq_length=8, num_workers=1)
    stores = []
    for answer in ("a", f"a {rank // 2}"):
        write(path, [chat("q", answer)])
        stores.append(build_token_store(config, [open_source(str(path), config)], path.parent / "cache", make_word_encoder))
    _require_same_on_all(stores[0])  # the places differ, but not the rows
    with pytest.raises(DataError) as error:
        _require_same_on_all(stores[1])
    return str(error.value)


def test_machines_that_have_other_rows_are_named(tmp_path: Path) -> None:
    found, host = run_ranks(_opens_its_own_rows, 3, str(tmp_path)), socket.gethostname()
    assert all(f": rank 0 on {host} has other tokens than rank 2 on {host}. Expected the same rows" in text for text in found)
