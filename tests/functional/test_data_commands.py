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
    assert found["total"]["rows"] == found["total"]["kept"] == 6 and found["total"]["routes"] == {"prefix": 6}
    assert "(2 documents), small" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")


def test_weights_keep_the_size_and_set_the_shares(flags: list[str], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    assert main(["report", *flags, "--prompt-data-weights", "1", "1", "--json", str(figures)]) == 0
    mixture = json.loads(figures.read_text())["mixture"]
    assert {name: entry["documents"] for name, entry in mixture.items()} == {"big": 3, "small": 3}


def test_missing_and_contradicting_flags_are_named_at_once(flags: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(["report", *flags, "--prompt-data-weights", "1", "--prompt-data-epochs", "1", "-1"]) == 2
    assert main(["preview"]) == 2
