"""Our FusedAdam is torch's Adam; schedule lengths come from the flags' own unit."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from megatron_sft.config.arguments import read_flags
from megatron_sft.config.groups import group_problems, parameter_groups
from megatron_sft.config.run import OptimConfig, RunConfig, TrainConfig
from megatron_sft.errors import ConfigError
from megatron_sft.train.adam import FusedAdam
from megatron_sft.train.optim import ITERATIONS, SAMPLES, STEPS_OF_DATA, ScheduleLengths, build_scheduler, schedule_lengths


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


def rate_trace(optim: OptimConfig, steps: int = 20, groups: tuple[dict, ...] = ()) -> list[list[float]]:
    """Each group's rate in every step of a run of `steps` steps."""
    run = RunConfig(train=TrainConfig(train_iters=steps), optim=optim)
    optimizer = SimpleNamespace(param_groups=[{}, *groups])
    scheduler = build_scheduler(optimizer, optim, schedule_lengths(run, steps, 80))
    trace = []
    for _ in range(steps):
        trace.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step(1)
    return [list(column) for column in zip(*trace, strict=True)]


def nanochat(step: int, steps: int, warmup: float, warmdown: float, final: float) -> float:
    """karpathy/nanochat scripts/chat_sft.py:get_lr_multiplier, without the 1e-8 that it adds to the progress."""
    progress = step / steps
    if progress < warmup:
        return progress / warmup
    if progress <= 1.0 - warmdown:
        return 1.0
    decay = (progress - (1.0 - warmdown)) / warmdown
    return (1 - decay) + decay * final


@pytest.mark.parametrize(
    ("warmup", "warmdown", "final"), [(0.0, 0.5, 0.0), (0.13, 0.37, 0.1), (0.25, 0.75, 0.5), (0.1, 0.0, 0.0)]
)
def test_rates_by_nanochats_flags_are_nanochats(warmup, warmdown, final):
    argv = f"--lr 0.01 --init-lr-frac 0.8 --warmup-ratio {warmup} --warmdown-ratio {warmdown} --final-lr-frac {final}"
    values, found = read_flags([*argv.split(), "--embedding-lr", "0.1"])
    optim = OptimConfig(**{path.split(".")[1]: value for path, value in values.items()})
    assert not found and not group_problems(optim)
    embedding, other = parameter_groups(optim)
    groups = tuple({"max_lr": group.lr, "min_lr": group.min_lr} for group in (embedding, other))
    expected = [nanochat(step, 20, warmup, warmdown, final) for step in range(20)]
    for rates, peak in zip(rate_trace(optim, groups=groups), (0.008, 0.08, 0.008), strict=True):
        assert rates == pytest.approx([peak * share for share in expected], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("flag", ["--lr-warmup-steps-ratio", "--warmup-steps-ratio", "--warmup-ratio", "--lr-warmup-fraction"])
def test_rates_by_verls_flags_are_verls(flag):
    """verl/utils/torch_functional.py:get_cosine_schedule_with_warmup: int(ratio * steps) steps up, then half a cosine."""
    values, _ = read_flags(["--lr", "0.01", flag, "0.17", "--min-lr-ratio", "0.1"])
    rates = rate_trace(OptimConfig(**{path.split(".")[1]: value for path, value in values.items()}))[0]
    expected = []
    for step in range(20):
        progress = (step - 3) / (20 - 3)
        expected.append(0.01 * (step / 3 if step < 3 else 0.55 + 0.45 * math.cos(math.pi * progress)))
    assert rates == pytest.approx(expected, rel=1e-12)


def test_megatrons_decoupled_rate_is_an_entry_of_the_table():
    values, found = read_flags("--lr 1e-3 --decoupled-lr 1e-4 --decoupled-min-lr 1e-6".split())
    assert not found and values["optim.param_groups"] == (r"^(embedding|output_layer)\. lr=1e-4 min_lr=1e-6",)
    values, _ = read_flags("--lr 1e-3 --min-lr 1e-5 --decoupled-lr 1e-4".split())
    assert values["optim.param_groups"] == (r"^(embedding|output_layer)\. lr=1e-4 min_lr=1e-05",)
    assert read_flags(["--decoupled-min-lr", "1e-6"])[1] == [
        "--decoupled-min-lr has no effect without --decoupled-lr. Add it, or leave it out."
    ]


def test_tokens_of_a_step_are_packs():
    assert read_flags("--total-batch-size 32768 --seq-length 4096".split()) == (
        {"data.seq_length": 4096, "train.global_batch_size": 8},
        [],
    )
    assert len(read_flags("--total-batch-size 30000 --seq-length 4096".split())[1]) == 1
    assert len(read_flags("--total-batch-size 8192 --seq-length 4096 --global-batch-size 3".split())[1]) == 1


def test_the_first_entry_that_matches_counts_and_scales_the_end():
    optim = OptimConfig(
        lr=1e-3,
        min_lr=1e-4,
        weight_decay=0.1,
        matrix_lr=1e-2,
        param_groups=("router lr=1e-5 min_lr=0 optimizer=sgd", r"layers\.0\. weight_decay=0.5"),
    )
    found = parameter_groups(optim)
    assert [(g.label, g.lr, g.min_lr, g.weight_decay, g.optimizer, g.decays_all) for g in found] == [
        ("router", 1e-5, 0.0, 0.1, "sgd", False),
        (r"layers\.0\.", 1e-3, 1e-4, 0.5, "adam", True),
        ("matrix", 1e-2, 1e-3, 0.1, "adam", False),
        ("other", 1e-3, 1e-4, 0.1, "adam", False),
    ]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("router", "nothing is set for it"),
        ("( lr=1", r"\( is no regular expression"),
        ("router lr=2", "lr=2: expected a number from 0 to 1"),
        ("router beta=1", "beta=1: expected one of lr=VALUE"),
        ("router optimizer=lion", "optimizer=lion: expected one of adam"),
        ("router lr=1e-6 min_lr=1e-5", "the rate of group router would rise from 1e-06 to 1e-05"),
    ],
)
def test_a_wrong_entry_is_named(entry, expected):
    assert re.search(expected, *group_problems(OptimConfig(param_groups=(entry,))))


def test_sgd_groups_equal_torch():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(3))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = FusedAdam([{"params": ours, "method": "sgd", "momentum": 0.9}], lr=0.1, weight_decay=0.01)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert set(mine.state[ours[0]]) == {"exp_avg"}
