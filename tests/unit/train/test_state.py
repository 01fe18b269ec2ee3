"""Run length and progress are pure integers."""

import pytest

from megatron_sft.config import TrainConfig
from megatron_sft.train.state import RunLength, TrainState, run_length


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (TrainConfig(train_iters=3), RunLength(3, 10)),
        (TrainConfig(train_iters=5), RunLength(5, 18)),
        (TrainConfig(train_samples=12), RunLength(4, 14)),
        (TrainConfig(train_samples=10), RunLength(3, 10)),
        (TrainConfig(train_samples=1), RunLength(1, 4)),
        (TrainConfig(num_epoch=1.0), RunLength(3, 10)),
        (TrainConfig(num_epoch=1.5), RunLength(5, 18)),
        (TrainConfig(num_epoch=2.0), RunLength(6, 20)),
    ],
)
def test_run_length_keeps_the_partial_batch_of_every_epoch(train, expected):
    assert run_length(train, num_packs=10, global_batch_size=4) == expected


def test_batch_larger_than_the_data_is_one_step_an_epoch():
    assert run_length(TrainConfig(num_epoch=3), num_packs=10, global_batch_size=64) == RunLength(3, 30)


def test_state_round_trip():
    state = TrainState(7, 70, 7000, 700)
    assert TrainState.from_dict({**state.to_dict(), "more": 1}) == state
