"""Progress is four integers."""

from megatron_sft.train.state import TrainState


def test_state_round_trip():
    state = TrainState(7, 70, 7000, 700)
    assert TrainState.from_dict({**state.to_dict(), "more": 1}) == state
