"""docs/documents.md says what became of each flag of five documents: the parser does just that, and the page has them all."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sft.config import flags
from megatron_sft.config.arguments import parse, read_flags
from megatron_sft.config.elsewhere import ELSEWHERE
from megatron_sft.config.run import DataConfig
from megatron_sft.data.schema import to_row
from megatron_sft.data.sources import open_source
from megatron_sft.plan import conf_flags
from tests.functional.conftest import metrics_of
from tests.gloo import run_script
from tests.unit.config.test_arguments import TUTORIAL

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(
    r"^\| `([-a-z][^`]*)` \| (works|told|not here) \| (.*) \|$", (ROOT / "docs/documents.md").read_text(), re.MULTILINE
)
SLIME = """--rollout-function-path slime.rollout.sft_rollout.generate_rollout --input-key messages --rollout-shuffle --num-epoch 3
    --rollout-batch-size 128 --global-batch-size 128 --loss-type sft_loss --calculate-per-token-loss
    --disable-compute-advantages-and-returns --debug-train-only"""
NANOCHAT = """run device-type model-tag model-step load-optimizer num-iterations max-seq-len device-batch-size total-batch-size
    embedding-lr unembedding-lr matrix-lr init-lr-frac warmup-ratio warmdown-ratio final-lr-frac eval-every eval-tokens
    chatcore-every chatcore-max-cat chatcore-max-sample mmlu-epochs gsm8k-epochs"""
VERL = """data.train_files data.val_files data.prompt_key data.response_key data.prompt_dict_keys data.response_dict_keys
    data.micro_batch_size data.multiturn.enable data.multiturn.messages_key data.max_length optim.lr model.partial_pretrain
    model.lora_rank model.lora_alpha model.target_modules trainer.default_local_dir trainer.project_name
    trainer.experiment_name trainer.logger trainer.total_epochs ulysses_sequence_parallel_size use_remove_padding"""
MILES = """--hf-checkpoint --ref-load --load --save --prompt-data --max-tokens-per-gpu --lr --lr-decay-style --lr-warmup-iters
    --n-samples-per-prompt --lora-rank"""


def test_the_page_has_every_flag_of_the_documents() -> None:
    shown = {re.split("[ =]", words)[0] for words, _, _ in ROWS}
    wanted = {word for text in (TUTORIAL, SLIME, MILES) for word in shlex.split(text) if word.startswith("--")}
    wanted |= {f"--{name}" for name in NANOCHAT.split()} | set(VERL.split())
    assert wanted <= shown, wanted - shown
    assert set(ELSEWHERE) <= shown


@pytest.mark.parametrize(("words", "outcome", "why"), ROWS, ids=[words for words, _, _ in ROWS])
def test_the_parser_does_what_the_page_says(words: str, outcome: str, why: str) -> None:
    argv = shlex.split(words)
    _, found = read_flags(argv)
    name = re.split("[ =]", words)[0]
    if outcome == "not here":
        assert len(found) == 1 and why.split(". ")[0].rstrip(".") in found[0], found
    else:
        assert found == [] and (name in flags.NO_EFFECT) == (outcome == "told")
    if outcome == "told":
        assert why == flags.NO_EFFECT[name][1]


def test_the_tutorials_torchrun_command_trains_word_for_word(tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Its flags, with the shape, rows and length of a tiny model; in the folder and with the file that it names."""
    assert (ROOT / "examples/post_training/modelopt/finetune.py").is_file()
    text = TUTORIAL.format(save=tmp_path / "out").replace("/path/to/Qwen3-0.6B", str(tiny_folder))
    tiny: dict[str, Any] = {"--num-layers": 4, "--hidden-size": 64, "--ffn-hidden-size": 96, "--num-attention-heads": 4}
    tiny |= {"--num-query-groups": 2, "--kv-channels": 16, "--rotary-base": 10000, "--max-position-embeddings": 512}
    tiny |= {"--train-samples": 4, "--lr-decay-samples": 4, "--seq-length": 256, "--finetune-hf-dataset": rows_file}
    tiny |= {"--make-vocab-size-divisible-by": 1, "--norm-epsilon": 1e-6}
    words = [word for word in shlex.split(text) if word != "--qk-layernorm"]
    for flag, value in tiny.items():
        if flag in words:
            words[words.index(flag) + 1] = str(value)
        else:
            words += [flag, str(value)]
    done = run_script(
        "examples/post_training/modelopt/finetune.py",
        [*words, "--untie-embeddings-and-output-weights", "--data-cache-path", tmp_path / "cache"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["iteration"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4]


def test_slimes_arguments_train_from_extra_arguments() -> None:
    run, _ = parse(["--hf-checkpoint", "M", "--prompt-data", "a.parquet", *shlex.split(SLIME)], 1)
    assert (run.train.global_batch_size, run.train.num_epoch, run.data.input_key) == (128, 3.0, "messages")


def test_miles_convert_command_is_read_with_its_flags() -> None:
    """tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} --hf-checkpoint M --save M_torch_dist, as `megatron-sft convert`."""
    words = [*conf_flags("Qwen/Qwen3-4B"), "--hf-checkpoint", "M", "--save", "M_torch_dist"]
    run, _ = parse(words, 1, training=False)
    assert (run.checkpoint.load, run.checkpoint.save, run.model.num_layers) == ("M", "M_torch_dist", 36)


def test_rows_as_the_documents_write_them_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    """OpenHermes as it is and with `messages`, verl's dict columns, nanochat's and Megatron-LM's conversations."""
    turns = [("human", "user", "What is 2+3?"), ("gpt", "assistant", "2+3 = 5")]
    messages = [{"role": role, "content": text} for _, role, text in turns]
    rows = {
        "openhermes": {"conversations": [{"from": name, "value": text} for name, _, text in turns]},
        "messages": {"messages": messages},
        "single": {"question": "What is 2+3?", "answer": "2+3 = 5"},
        "dict": {"extra_info": {"question": "What is 2+3?", "answer": "2+3 = 5"}},
    }
    tokens = set()
    for name, row in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        keys = {"prompt_key": "extra_info", "response_key": "extra_info"} if name == "dict" else {}
        keys |= {"prompt_dict_keys": ("question",), "response_dict_keys": ("answer",)} if name == "dict" else {}
        config = DataConfig(tokenizer_model=str(tiny_folder), train_data=(str(path),), **keys)
        (where, record), *_ = open_source(str(path), config)
        tokens.add(tuple((m["role"], m["content"]) for m in to_row(record, where, config).messages))
    assert tokens == {tuple((role, text) for _, role, text in turns)}


def test_a_key_of_verl_is_answered_with_its_flag() -> None:
    words = ["data.train_files=a.parquet", "+data.response_dict_keys=['answer']", "optim.lr=1e-4"]
    done = subprocess.run([sys.executable, "finetune.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    for sentence in ("It is --train-data FILE ... here.", "It is --response-dict-keys KEY ... here.", "It is --lr here."):
        assert sentence in done.stdout + done.stderr
