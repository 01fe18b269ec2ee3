"""Values that are right alone and wrong together; settings without effect; what an unknown flag is answered."""

import dataclasses

import pytest

from megatron_sft import log
from megatron_sft.config.arguments import parse
from megatron_sft.config.log import NAMES, LogConfig, is_installed
from megatron_sft.config.problems import problems
from megatron_sft.config.run import ModelConfig, ParallelConfig, RunConfig
from megatron_sft.errors import ConfigError

NEEDED = ["--load", "model", "--finetune-hf-dataset", "rows.jsonl"]
WHOLE = "--num-layers 4 --hidden-size 32 --vocab-size 64 --padded-vocab-size 64"
TOGETHER = {
    "--micro-batch-size 8 --global-batch-size 4": "--micro-batch-size 8 is above --global-batch-size 4: a step has no such",
    "--rollout-batch-size 8 --global-batch-size 4": "--rollout-batch-size 8, --global-batch-size 4: both say how many packs",
    "--train-iters 5 --lr-warmup-iters 5": "--lr-warmup-iters 5: the schedule ends with --train-iters 5. Expected fewer",
    "--train-samples 9 --lr-decay-samples 4 --lr-warmup-samples 4": "--lr-warmup-samples 4: the schedule ends with --lr-decay-",
    "--lr-decay-style WSD": "--lr-decay-style WSD needs the length of its last part. Give --lr-wsd-decay-iters",
    "--train-iters 9 --lr-decay-style WSD --lr-wsd-decay-iters 10": "--lr-wsd-decay-iters 10: --train-iters 9 leave 9 for it",
    "--lr-wsd-decay-iters 10": "--lr-wsd-decay-iters has no effect without --lr-decay-style WSD",
    "--lr 1e-5 --min-lr 1e-4": "--min-lr 0.0001 is above --lr 1e-05. Lower it",
    "--lr 1e-5 --lr-warmup-init 1e-4": "--lr-warmup-init 0.0001 is above --lr 1e-05. Lower it",
    "--muon-variant nanochat": "--muon-variant nanochat has no effect without --optimizer muon",
    "--sgd-momentum 0.5": "--sgd-momentum 0.5 has no effect without --optimizer sgd",
    "--optimizer muon --muon-variant nanochat --muon-momentum 0.5": "--muon-momentum has no effect with --muon-variant nanochat",
    "--optimizer muon --lora-rank 4": "--optimizer muon with adapters: what is trained are factors",
    "--final-lr-frac 0.1 --min-lr 1e-6": "--final-lr-frac and --min-lr both say where the rate ends",
    "--warmup-ratio 0.7 --warmdown-ratio 0.5": "--warmup-ratio 0.7 and --warmdown-ratio 0.5 are more than the whole",
    "--optimizer sgd --use-precision-aware-optimizer --bf16": "--use-precision-aware-optimizer: expected adam alone, not sgd",
    "--optimizer-offload-fraction 0.5": "--optimizer-offload-fraction 0.5 has no effect without --optimizer-cpu-offload",
    "--recompute-granularity full": "--recompute-granularity full needs --recompute-method",
    "--recompute-num-layers 1": "--recompute-method and --recompute-num-layers have no effect without",
    "--recompute-modules mlp": "--recompute-modules has no effect without --recompute-granularity selective",
    "--loss-spike-action stop": "--loss-spike-action stop has no effect without --loss-spike-factor",
    "--skip-train": "--skip-train needs --eval-iters",
    "--best-metric loss": "--best-metric loss: nothing measures it; expected valid/loss, valid/bits_per_byte, each perhaps",
    "--best-metric eval/x": "--best-metric eval/x: nothing measures it; expected a task of --eval-tasks behind eval/",
    "--best-metric eval/gsm8k/chat": "--best-metric eval/gsm8k/chat: nothing measures it; expected --eval-tasks gsm8k/chat",
    "--early-stop-patience 2": "--best-metric valid/loss: nothing measures it; expected --eval-iters (-1: all held-out rows)",
    "--save-interval 5": "--save-interval has no effect without --save",
    "--use-wandb": "--use-wandb needs --wandb-project",
    "--wandb-group g --wandb-mode offline": "--wandb-group, --wandb-mode without --wandb-project: nothing is sent",
    "--mlflow-run-name n": "--mlflow-run-name without --mlflow-experiment: nothing is sent",
    "--trackio-name n --trackio-group g": "--trackio-name, --trackio-group without --trackio-project: nothing is sent",
    "--swanlab-mode offline": "--swanlab-mode without --swanlab-project: nothing is sent",
    "--use-dynamic-batch-size": "--use-dynamic-batch-size needs --max-tokens-per-gpu",
    f"{WHOLE} --expert-model-parallel-size 2": "--expert-model-parallel-size 2: the model has no experts. Expected 1",
    f"{WHOLE} --moe-z-loss-coeff 1 --moe-router-dtype fp32": "--moe-router-dtype, --moe-z-loss-coeff: the model has no experts",
    "--decoder-first-pipeline-num-layers 2": "--decoder-first- and --decoder-last-pipeline-num-layers need --pipeline-",
    "--num-experts 4 --moe-router-topk 5": "--moe-router-topk 5 is above --num-experts 4",
    "--num-experts 4 --moe-router-num-groups 3 --moe-router-group-topk 1": "--moe-router-num-groups 3 and",
    "--moe-aux-loss-coeff 1 2": "--moe-aux-loss-coeff has 2 values; expected one",
    "--num-layers 4 --moe-layer-freq [1]*3": "--moe-layer-freq names 3 layers; expected --num-layers 4",
    "--no-rope-freq 0": "--no-rope-freq 0: expected every how many layers, from 1 on",
    "--num-experts 4 --moe-layer-freq 0": "--moe-layer-freq 0: expected every how many layers, from 1 on",
    f"{WHOLE} --mscale-all-dim 0": "--mscale-all-dim: the model has no latent attention",
    "--num-layers 4 --no-rope-freq 3": "--no-rope-freq 3 does not divide --num-layers 4",
    "--num-attention-heads 4 --num-query-groups 3": "--num-query-groups 3 does not divide --num-attention-heads 4",
    f"{WHOLE} --window-attn-skip-freq 2": "--window-attn-skip-freq has no effect without --window-size",
}


@pytest.mark.parametrize("flags", TOGETHER)
def test_what_contradicts_is_one_sentence_with_a_way_out(flags: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([*NEEDED, *flags.split()], 2 if "expert-model" in flags else 1)
    assert [problem for problem in error.value.problems if problem.startswith(TOGETHER[flags])], error.value.problems
    assert len(error.value.problems) == 1 and error.value.problems[0].endswith("."), error.value.problems


def test_two_lengths_of_a_program_are_refused() -> None:
    run, _ = parse([*NEEDED, "--train-iters", "3"], 1)
    both = dataclasses.replace(run, train=dataclasses.replace(run.train, num_epoch=1.0))
    expected = "--train-iters 3, --num-epoch 1: expected one of --train-iters, --train-samples, --num-epoch. Give one."
    assert (problems(run, 1), problems(both, 1)) == ([], [expected])


REFUSED = {
    "--fp8 hybrid": "layers compute in bf16 or fp32 alone here. Leave it out, and use --bf16.",
    "--fp8-format hybrid": "layers compute in bf16 or fp32 alone here. Leave it out, and use --bf16.",
    "--fp4 e2m1": "layers compute in bf16 or fp32 alone here. Leave it out, and use --bf16.",
    "--use-kitchen": "layers compute in bf16 or fp32 alone here. Leave it out, and use --bf16.",
    "--mtp-num-layers 1": "further tokens are not predicted here: such layers of a checkpoint are left as they are. "
    "Leave it out.",
    "--qk-clip": "attention scores are not clipped here. Leave it out; --clip-grad limits the gradient.",
    "--cpu-offloading": "activations stay on the device here. Leave it out, and use --recompute-granularity.",
    "--moe-expert-capacity-factor 2": "experts take every token that is routed to them here, in every layout. Leave it out.",
    "--hidden-dropout 0.1": "expected 0. Correct it.",
    "--no-create-attention-mask-in-dataloader": "unknown flag. See --help.",
    "--no-reset-attention-maks": "unknown flag. See --help.",
    "--reset-attention-maks": "unknown flag. Did you mean --reset-attention-mask?",
    "--no-shufle": "unknown flag. Did you mean --no-shuffle?",
    "--train_iters 3": "unknown flag. Did you mean --train-iters?",
    "--seqlength 3": "unknown flag. Did you mean --seq-length?",
    "--bf16=true": "expected no value. Write --bf16 alone.",
    "--lr": "expected a value after it. Add one, or leave the flag out.",
    "--role-map bot": "expected NAME=VALUE, each name once. Correct it.",
    "--role-map bot=user bot=assistant": "expected NAME=VALUE, each name once. Correct it.",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_flag_that_cannot_work_says_why(flags: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([*NEEDED, *flags.split()], 1)
    name = flags if "dropout" in flags or "role-map" in flags else flags.split()[0]
    assert error.value.problems == (f"{name}: {REFUSED[flags]}",)


TOLD = {
    "--tp-comm-overlap": "--tp-comm-overlap has no effect: this project chooses kernels by what the machine has.\n",
    "--gradient-accumulation-fusion": "--gradient-accumulation-fusion has no effect: this project chooses kernels by what the "
    "machine has.\n",
    "--apply-rope-fusion": "--apply-rope-fusion has no effect: this project chooses kernels by what the machine has.\n",
    "--sequence-parallel": "--sequence-parallel has no effect: --tensor-model-parallel-size is 1.\n",
    "--seq-length 64 --max-length 32": "--seq-length 64 has no effect: --max-length 32 comes later.\n",
    "--accumulate-allreduce-grads-in-fp32 --hidden-dropout 0.0": "",
    "--exit-on-missing-checkpoint": "--exit-on-missing-checkpoint has no effect: that is how this project always works.\n",
}


@pytest.mark.parametrize("flags", TOLD)
def test_a_flag_without_effect_is_told_in_one_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(0)
    parse([*NEEDED, *flags.split()], 1)
    assert capsys.readouterr().out == TOLD[flags]


def test_a_program_cannot_ask_for_sequence_parallelism_alone() -> None:
    run = RunConfig(ModelConfig(), ParallelConfig(sequence_parallel=True))
    assert problems(run, 1, training=False) == ["--sequence-parallel needs --tensor-model-parallel-size 2 or more. Leave it out."]


@pytest.mark.parametrize(("package", "field"), NAMES.items())
def test_a_package_that_is_missing_is_noticed_before_any_work(package, field, tmp_path, monkeypatch) -> None:
    (tmp_path / "wandb_logs").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [is_installed(name) for name in ("json", "no_such_package", "wandb_logs")] == [True, False, False]
    run = RunConfig(log=LogConfig(**{field: "p"}))
    found = [sentence for sentence in problems(run, 1) if package in sentence]
    flag = "--" + field.replace("_", "-")
    needed = f"{flag} needs the package {package}, which is not installed. Run: pip install {package}. Or leave it out."
    assert found == ([] if is_installed(package) else [needed])


def test_an_optimizer_of_the_table_has_flags_of_its_own() -> None:
    entry = r"layers\.0\. optimizer=sgd"
    assert parse([*NEEDED, "--param-groups", entry, "--sgd-momentum", "0.5"], 1)[0].optim.sgd_momentum == 0.5
