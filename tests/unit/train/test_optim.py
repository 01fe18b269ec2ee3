"""Our FusedAdam is torch's Adam; schedule lengths come from the flags' own unit."""

import pytest
import torch

from megatron_sft.config.run import OptimConfig, RunConfig, TrainConfig
from megatron_sft.errors import ConfigError
from megatron_sft.train.adam import FusedAdam
from megatron_sft.train.optim import ITERATIONS, SAMPLES, STEPS_OF_DATA, ScheduleLengths, schedule_lengths


@pytest.mark.parametrize(("adam_w_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_fused_adam_equals_torch(adam_w_mode, reference):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(3))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizers = FusedAdam(ours, adam_w_mode=adam_w_mode, **settings), reference(theirs, **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optimizers[0].param_groups[0]["step"] == 5


@pytest.mark.parametrize(
    ("train", "optim", "expected"),
    [
        (dict(train_iters=20), dict(), ScheduleLengths(ITERATIONS, 0, 20, None)),
        (dict(train_iters=20), dict(lr_warmup_iters=3), ScheduleLengths(ITERATIONS, 3, 20, None)),
        (dict(train_iters=20), dict(lr_warmup_fraction=0.1), ScheduleLengths(ITERATIONS, 2, 20, None)),
        (dict(train_samples=75), dict(lr_decay_samples=60, lr_warmup_samples=5), ScheduleLengths(SAMPLES, 5, 60, None)),
        (dict(train_samples=75), dict(), ScheduleLengths(SAMPLES, 0, 80, None)),
        (dict(num_epoch=2.0), dict(lr_decay_iters=15), ScheduleLengths(ITERATIONS, 0, 15, None)),
        (dict(num_epoch=2.0), dict(lr_decay_style="WSD", lr_wsd_decay_iters=7), ScheduleLengths(STEPS_OF_DATA, 0, 20, 7)),
    ],
)
def test_schedule_lengths(train, optim, expected):
    run = RunConfig(train=TrainConfig(**train), optim=OptimConfig(**optim))
    assert schedule_lengths(run, total_iterations=20, total_samples=80) == expected


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (dict(lr_warmup_iters=20), "--lr-warmup-iters 20: the schedule ends with its 20 steps of data. Expected fewer"),
        (
            dict(lr_decay_style="WSD", lr_warmup_iters=3, lr_wsd_decay_iters=18),
            "--lr-wsd-decay-iters 18: its 20 steps of data leave 17 for it after the warm-up. Expected at most that",
        ),
    ],
)
def test_a_schedule_whose_parts_are_longer_than_the_run_is_refused(optim, expected):
    run = RunConfig(train=TrainConfig(num_epoch=2.0), optim=OptimConfig(**optim))
    with pytest.raises(ConfigError, match=expected):
        schedule_lengths(run, total_iterations=20, total_samples=80)
