"""`megatron-sft prepare`, `preview` and `report` as a user runs them, on a tiny tokenizer with Qwen2.5's template."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_sft.__main__ import main

TEMPLATE = Path(__file__).parents[1] / "assets" / "chat_templates" / "qwen2_5.jinja"


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Two sources of 4 and 2 rows, and where the caches go."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, count in (("big", 4), ("small", 2)):
        rows = [
            {"messages": [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": f"{name} \u4f60 {i}"}]}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--prompt-data", "big", str(tmp_path / "big.jsonl"), "small", str(tmp_path / "small.jsonl")]
    return [
        *data,
        "--tokenizer-model",
        str(tmp_path / "tokenizer"),
        "--seq-length",
        "512",
        "--data-cache-path",
        str(tmp_path / "cache"),
    ]


def test_prepare_builds_the_store_that_later_runs_open(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *flags]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("token store: "))
    built = (folder / "tokens.bin").stat().st_mtime_ns
    assert main(["prepare", *flags]) == 0
    assert (folder / "tokens.bin").stat().st_mtime_ns == built


def test_preview_shows_masks_and_packs(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["preview", *flags, "--rows", "1", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n[[big \u4f60 0<|im_end|>]]\n" in shown
    assert "[[small \u4f60 0<|im_end|>]]" in shown and "big \u4f60 1" not in shown
    assert "small.jsonl:1 (small, document 4)" in shown
    text = page.read_text(encoding="utf-8")
    assert text.count('class="t') > 10 and "&lt;" in text and "<script" not in text and "http" not in text


def test_report_gives_the_realised_mixture(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    mixed = [*flags, "--prompt-data-epochs", "0.5", "2.5"]
    assert main(["report", *mixed, "--json", str(figures), "--html", str(page)]) == 0
    found = json.loads(figures.read_text())
    assert {name: entry["documents"] for name, entry in found["mixture"].items()} == {"big": 2, "small": 5}
    assert found["total"]["rows"] == found["total"]["kept"] == 6 and found["total"]["routes"] == {"plain": 6}
    assert "(2 documents), small" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")


def test_weights_keep_the_size_and_set_the_shares(flags: list[str], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    assert main(["report", *flags, "--prompt-data-weights", "1", "1", "--json", str(figures)]) == 0
    mixture = json.loads(figures.read_text())["mixture"]
    assert {name: entry["documents"] for name, entry in mixture.items()} == {"big": 3, "small": 3}


def test_missing_and_contradicting_flags_are_named_at_once(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *flags, "--prompt-data-weights", "1", "--prompt-data-epochs", "1", "0"]) == 2
    told = "".join(capsys.readouterr())
    assert "contradict each other" in told and "1 values of train_weights for 2 sources" in told
    assert main(["report", *flags, "--prompt-data-epochs", "nan", "1e9", "--split", "nan,1,0", "--max-bad-rows", "-1"]) == 2
    told = "".join(capsys.readouterr())
    assert "--prompt-data-epochs nan 1e9: expected a number from 0 to 1000, each" in told
    assert "--split nan,1,0: expected shares" in told and "--max-bad-rows -1: expected a whole number from 0" in told
    assert main(["preview"]) == 2
    told = "".join(capsys.readouterr())
    assert "no training data" in told and "--tokenizer-model is missing" in told


ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "the line holds a JSON list"),
        ('{"messages": [{"role": "system", "content": "s"}]}', "no assistant message"),
        ('{"messages": [{"role": "bot", "content": "s"}]}', "message 1 has role 'bot'"),
        (ROW.replace('"Yes"', "null"), "message 2 has content that is null"),
        (ROW.replace('"Yes"', '"' + "x" * 600 + '"'), "expected at most --seq-length 512"),
        (ROW.replace('"Yes"', '"\\ud800"'), "lone surrogate"),
    ],
)
def test_a_bad_row_stops_prepare_or_is_set_aside(
    line: str, reason: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{ROW}\n{line}\n{ROW}\n")
    own = ["--prompt-data", str(path), *flags[5:], "--truncation", "error"]
    assert main(["prepare", *own]) == 2
    told = "".join(capsys.readouterr())
    assert f"{path}:2: " in told and reason in told
    assert main(["prepare", *own, "--max-bad-rows", "1"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("token store: "))
    (quarantined,) = (json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines())
    assert quarantined["where"] == f"{path}:2" and reason in quarantined["message"]


def test_a_runaway_template_ends_prepare_within_seconds(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert main(["prepare", *flags, "--chat-template", text]) == 2
    assert "the chat template takes too long" in "".join(capsys.readouterr())


def test_a_bare_sentencepiece_model_can_be_prepared(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Hi <b>", "big small 0 1 2 3"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
        num_threads=1,
    )
    template = (TEMPLATE.parent / "instruct.jinja").read_text()
    own = [*flags[:5], *flags[7:], "--tokenizer-model", str(tmp_path / "tokenizer.model"), "--chat-template", template]
    assert main(["preview", *own, "--rows", "1"]) == 0
    assert "[[big \u4f60 0</s>]]" in capsys.readouterr().out
