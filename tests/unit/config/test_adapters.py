"""What the flags of adapters and of freezing may not be together; their other spellings."""

import pytest

from megatron_sft.config.arguments import parse
from megatron_sft.config.run import LoraConfig
from megatron_sft.errors import ConfigError

NEEDED = ["--finetune-hf-dataset", "rows.jsonl", "--tokenizer-model", "model", "--load", "model"]
FAULTS = {
    "--lora-alpha 8": "--lora-alpha has no effect without --lora-rank. Add it, or leave it out.",
    "--lora-rank 8 --lora-type dora --lora-dropout 0.1": (
        "--lora-dropout 0.1 with --lora-type dora: expected 0. Leave one of them out."
    ),
    "--freeze embedding --train-only router": "--freeze and --train-only contradict each other. Give one of them.",
    "--freeze embedding --lora-rank 8": "--freeze with adapters, beside which nothing is trained. Leave one of them out.",
    "--train-only (": (
        "--train-only (: missing ), unterminated subpattern at position 0; expected a regular expression. Correct it."
    ),
    "--lora-rank 4 --lora-dropout 0.1 --num-experts 4 --expert-tensor-parallel-size 2": (
        "--lora-dropout 0.1 with experts that --expert-tensor-parallel-size cuts: expected 0, or experts that are whole. Leave "
        "the first out, or use 1 (ETP=1)."
    ),
}
SPELLINGS = {
    "--lora-dim 8": LoraConfig(lora_rank=8),
    "--lora-rank 8 --target-modules q_proj v_proj": LoraConfig(lora_rank=8, lora_target_modules=("q_proj", "v_proj")),
    "--lora-rank 8 --lora-target all-linear": LoraConfig(lora_rank=8),
    "--adapter-path out --merge-lora": LoraConfig(lora_load="out", lora_merge=True),
}


@pytest.mark.parametrize("flags", FAULTS)
def test_what_contradicts_is_said(flags: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([*NEEDED, *flags.split()], 2)
    assert FAULTS[flags] in error.value.problems


@pytest.mark.parametrize("flags", SPELLINGS)
def test_other_projects_flags_mean_the_same(flags: str) -> None:
    assert parse([*NEEDED, *flags.split()], 1)[0].lora == SPELLINGS[flags]


def test_the_scale_is_that_of_the_papers() -> None:
    assert LoraConfig(lora_rank=16).scale == 2.0 and LoraConfig(lora_rank=16, lora_alpha=8.0).scale == 0.5
    assert LoraConfig(lora_rank=16, lora_alpha=8.0, lora_type="rslora").scale == 2.0
