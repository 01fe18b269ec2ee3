"""Progress of a run, and when a step's loss is a spike."""

import dataclasses

from megatron_sft.train.state import LOSS_MEMORY, LOSS_STEPS, TrainState


def test_state_round_trip():
    state = TrainState(7, 70, 7000, 700, 1, 7, 2.5)
    assert TrainState.from_dict({**state.to_dict(), "more": 1}) == state


def test_a_checkpoint_without_the_later_fields_is_read():
    old = {"iteration": 7, "consumed_samples": 70, "tokens_seen": 7000, "trained_tokens": 700}
    assert TrainState.from_dict(old) == TrainState(7, 70, 7000, 700)


def test_evaluations_without_a_better_one_are_counted():
    state = TrainState(iteration=2)
    assert not state.is_stale(1)
    for iteration, value, best, stale in [
        (2, 3.0, 2, 0),
        (4, 2.0, 4, 0),
        (6, 2.0, 4, 1),
        (8, float("nan"), 4, 2),
        (10, 1.0, 10, 0),
    ]:
        state = dataclasses.replace(state, iteration=iteration).with_metric("valid/loss", value, is_less_better=True)
        assert (state.best_iteration, state.stale_evaluations) == (best, stale)
    assert not state.is_stale(None) and not state.is_stale(1)
    state = state.with_metric("eval/gsm8k/chat", 0.5, is_less_better=False)
    assert (state.best_value, state.stale_evaluations) == (0.5, 0), "another metric starts anew"
    state = state.with_metric("eval/gsm8k/chat", 0.4, is_less_better=False)
    assert (state.best_value, state.stale_evaluations, state.is_stale(1)) == (0.5, 1, True)
    assert TrainState.from_dict(state.to_dict()) == state


def test_a_spike_is_above_the_running_mean_and_counts_at_most_as_the_limit():
    state = TrainState()
    for loss in [1.0, 3.0] * (LOSS_STEPS // 2):
        assert state.loss_limit(2.0) == float("inf")
        state = state.with_loss(loss, float("inf"))
    assert (state.loss_mean, state.loss_limit(2.0), state.loss_limit(None)) == (2.0, 4.0, float("inf"))
    spiked = state.with_loss(1e9, state.loss_limit(2.0))
    assert spiked.loss_mean == 2.0 + (4.0 - 2.0) / (LOSS_STEPS + 1)


def test_the_mean_is_exponential_after_its_memory():
    state = TrainState(loss_steps=LOSS_MEMORY, loss_mean=1.0).with_loss(2.0, float("inf"))
    assert (state.loss_steps, state.loss_mean) == (LOSS_MEMORY, 1.0 + 1.0 / LOSS_MEMORY)
