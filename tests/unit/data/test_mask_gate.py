"""The gate blames a template, never a row; the build sets aside every row that it cannot use, whatever the row does."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_sft.config.run import DataConfig
from megatron_sft.data import trial
from megatron_sft.data.chat import ChatEncoder
from megatron_sft.data.mask_gate import check_masks
from megatron_sft.data.schema import Row
from megatron_sft.errors import ConfigError, DataError
from tests.soak import hostile_rows
from tests.soak.hostile_rows import BOMB, CHAT, CHATML, ENDLESS, LONG_STEP, encoder_of, when


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may take 0.5 s of processor time, and as much for each million characters as ever."""
    monkeypatch.setattr(trial, "ROW_S", 0.5)
    monkeypatch.setattr(trial, "STEP_S", 0.2)


@pytest.mark.parametrize("does", [ENDLESS, LONG_STEP])
@pytest.mark.parametrize("condition", ["true", "add_generation_prompt"])
def test_a_template_that_runs_away_is_refused(does: str, condition: str) -> None:
    """In the second case it does when spans.py learns it."""
    rows = [Row(CHAT, where=f"a:{i}") for i in range(20)]
    with pytest.raises(ConfigError, match=r"m: the chat template takes too long\. Correct it, or pass --chat-template\."):
        check_masks(encoder_of(f"{{% if {condition} %}}{does}{{% endif %}}{CHATML}"), rows)


@pytest.mark.parametrize("does", [ENDLESS, LONG_STEP, BOMB, "{{ nothing.at.all }}"])
def test_a_row_with_which_the_template_runs_away_is_not_the_templates_fault(does: str) -> None:
    rows = [
        Row([{"role": "user", "content": "a"}, {"role": "assistant", "content": said}], where="a:1") for said in ("boom", "a")
    ]
    assert check_masks(encoder_of(when("boom", does) + CHATML), rows) == {"plain": 1}


@pytest.mark.parametrize("bomb", ["{{ 'a' * 10000000000 }}", "{{ 'a'|center(10000000000) }}", "{% set x = [0] * 10000000000 %}"])
def test_a_bomb_in_a_constant_is_refused(bomb: str) -> None:
    with pytest.raises(ConfigError, match=r"m: the chat template runs away: MemoryError\. Correct it"):
        check_masks(encoder_of(bomb), [Row(CHAT, where="a:1")])


def test_a_template_that_fails_on_every_row_is_refused_and_one_that_says_no_is_not() -> None:
    rows = [Row(CHAT, where=f"a:{i}") for i in range(3)]
    with pytest.raises(ConfigError, match=r"m: the chat template fails on the conversation: 'nothing' is undefined\. Correct it"):
        check_masks(encoder_of("{{ nothing.at.all }}"), rows)
    assert check_masks(encoder_of("{{ raise_exception('no') }}"), rows) == {}


def test_an_end_that_is_not_trained_is_refused() -> None:
    bpe = Tokenizer(models.BPE({"x": 0, "xx": 1, "e": 2}, [("x", "x")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="e")
    tokenizer.chat_template = "{% generation %}" + "x" * 15 + "{% endgeneration %}" + "x" * 17  # a token crosses the end
    with pytest.raises(DataError, match=r"a:1: the end of the answer .* is not trained"):
        check_masks(ChatEncoder(tokenizer, DataConfig(tokenizer_model="m")), [Row(CHAT, where="a:1")])


def test_every_hostile_row_is_one_bad_row_at_most(tmp_path: Path) -> None:
    assert hostile_rows.check(tmp_path, encoder_of(hostile_rows.TEMPLATE), 10_000) == (40, 14)
