"""What a run says to the person who started it: before its first step, while it trains, when it saves, at its end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sft.config.arguments import parse
from megatron_sft.data.preview import TRAINED, TRAINED_END
from megatron_sft.environment import started
from megatron_sft.train.next_steps import commands
from tests.functional.conftest import metrics_of
from tests.functional.terminal import on_terminal
from tests.functional.test_docs import LAUNCHER, READERS, ROOT
from tests.gloo import run_script


def test_a_run_says_what_it_does_and_what_to_do_with_it(finetune: Any, tmp_path: Path) -> None:
    save = tmp_path / "out"
    flags = ["--save", save, "--train-iters", "4", "--save-interval", "3", "--log-interval", "2", "--global-batch-size", "2"]
    done = finetune(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert re.search(r"--- \S+rows.jsonl:\d+ \(rows, document \d+\): \d+ tokens, \d+ trained   \[\[trained\]\]\n", said)
    assert re.search(r"<\|start\|>assistant\n\[\[It is \d+\..*<\|end\|>\]\]\n\n---\n", said), said
    assert re.search(r"\nmodel: 156,736 parameters in fp32\nmemory: 0\.\d+ GB expected on the one rank \(weights 0\.001,", said)
    assert "\nlength: 4 steps of 2 packs; an epoch is 4 steps, 7 packs, 1,727 tokens\n" in said
    assert f"\nresults: checkpoints every 3 steps and at the end, metrics.jsonl and tensorboard in {save}\n" in said
    assert re.findall(r"saved (\S+) \([\d.]+ MB\) in [\d.]+ s\n", said) == [f"{save}/iter_{n:07d}" for n in (3, 4)]
    metrics = metrics_of(save)
    tokens = [line["sft/trained_tokens"] for line in metrics]
    weighed = [line["sft/loss"] * line["sft/trained_tokens"] for line in metrics]
    means = [float(text) for text in re.findall(r"lm loss: (\S+)", said)]
    assert means == pytest.approx([sum(weighed[i : i + 2]) / sum(tokens[i : i + 2]) for i in (0, 2)], rel=1e-6)
    assert [float(text) for text in re.findall(r"step loss: (\S+)", said)] == pytest.approx(
        [metrics[i]["sft/loss"] for i in (1, 3)], rel=1e-6
    )
    assert f"\ntrained to the end, 4 iterations: checkpoints in {save}\n" in said and "go on" not in said
    steps = dict(re.findall(r"^  (generate|export|report) +(.*)$", said, flags=re.MULTILINE))
    for name, more in (
        ("generate", ["--prompt", "Hi", "--osl", "3"]),
        ("export", []),
        ("report", ["--output", tmp_path / "a.html"]),
    ):
        words = [word for word in shlex.split(steps[name]) if "=" not in word]
        assert words[1:4] == ["-m", "megatron_sft", name]
        result = run_script("megatron_sft/__main__.py", [*words[3:], *more])
        assert result.returncode == 0, result.stdout + result.stderr
        assert "tokens/s" not in result.stdout, "what generate prints is answers"
    assert (tmp_path / "out_hf" / "config.json").exists() and "Training of out" in (tmp_path / "a.html").read_text()


def test_a_terminal_has_colours_and_a_bar_and_ctrl_c_says_how_to_go_on(
    tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    flags = ["--load", tiny_folder, "--finetune-hf-dataset", rows_file, "--seq-length", "256", "--save", tmp_path / "out"]
    flags += ["--data-cache-path", tmp_path / "cache", "--num-workers", "1", "--num-epoch", "900"]
    with on_terminal("finetune.py", flags) as screen:
        screen.until("results: checkpoints at the end")
        screen.until(" tokens/s")
        os.kill(screen.script.ranks[0].pid, signal.SIGINT)
        assert screen.end() == 130
    seen = screen.plain
    assert re.search(r"step +\d+/\d+ \|.*\| \d\d:\d\d gone, [\d:?]+ left, loss \d+\.\d{4}, [\d,]+ tokens/s", seen)
    assert "lm loss" not in seen
    stopped = re.search(r"stopped after iteration (\d+) of \d+: checkpoints in \S+\n  go on     (.*)\n  generate  ", seen)
    assert stopped and f"saved {tmp_path}/out/iter_{int(stopped[1]):07d} (" in seen
    _, program, *again = shlex.split(stopped[2])
    assert Path(program).name == "finetune.py" and again == list(map(str, flags))


def test_the_sample_shows_what_is_trained_and_its_end_in_colour(tiny_folder: Path, rows_file: Path) -> None:
    from transformers import AutoTokenizer

    from megatron_sft.config.run import DataConfig
    from megatron_sft.data.preview import decoder, sample_text
    from megatron_sft.data.sft_dataset import SFTDataset

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    store = SFTDataset.from_files([str(rows_file)], tokenizer, 256, DataConfig()).store
    text = sample_text(store, 1, decoder(tokenizer), set(tokenizer.added_tokens_decoder), 512, is_coloured=True)
    assert f"assistant\x1b[0m\n\x1b[2m\x1b[0m{TRAINED}It is 3. Really.\x1b[0m{TRAINED_END}<|end|>\x1b[0m" in text
    short = sample_text(store, 1, decoder(tokenizer), set(), 20, is_coloured=False)
    assert short.startswith("--- ") and "\n<|start|>user\nWhat\n... " in short and short.endswith("[[ Really.<|end|>]]\n\n---"), (
        short
    )


def test_a_script_names_scripts_with_their_variables(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, collected = tmp_path / "launcher.py", tmp_path / "collected"
    dump = "open(os.environ['COLLECTED'] + '.env', 'w').write(json.dumps(dict(os.environ)))\n"
    launcher.write_text(LAUNCHER + dump)
    launch = {"LAUNCH_SCRIPT": f"'{sys.executable}' '{launcher}'", "COLLECTED": str(collected)}
    given = {"TP": "2", "HF_MODEL_CKPT": str(tiny_folder), "MLM_EXTRA_ARGS": "--num-epoch 2 --save-hf 'a b'"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MLM_", "HF_"))}
    folder = "examples/post_training/modelopt"

    def run(line: str) -> list[str]:
        subprocess.run(["bash", "-euc", line], cwd=ROOT, env={**plain, **launch}, check=True, timeout=60)
        words = json.loads(collected.read_text().splitlines()[-1])
        return words[next(place for place, word in enumerate(words) if Path(word).name in READERS) :]

    line = " ".join(f"{name}={shlex.quote(value)}" for name, value in given.items())
    first = run(f"{line} MLM_MODEL_SAVE={tmp_path}/out {folder}/finetune.sh Qwen/Qwen3-0.6B")
    config, _ = parse(first[1:], 2)
    monkeypatch.setattr(os, "environ", json.loads(Path(f"{collected}.env").read_text()))
    shown = commands(config, started())
    monkeypatch.undo()
    assert shown["go on"].endswith(f"{folder}/finetune.sh Qwen/Qwen3-0.6B") and run(shown["go on"]) == first
    for name in ("generate", "export"):
        words = run(shown[name])
        again, *_ = READERS[Path(words[0]).name](words[1:])
        assert again.checkpoint.load == str(tmp_path / "out") and again.data.tokenizer_model == str(tiny_folder)
        assert again.parallel.tensor_model_parallel_size == 2
        assert again.checkpoint.save_hf == (f"{tmp_path}/out_hf" if name == "export" else None)
