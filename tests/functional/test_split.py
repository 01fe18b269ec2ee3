"""--split from the command line: what it holds out is not trained on, row by row."""

import dataclasses
import json

from megatron_sft.config.run import DataConfig
from megatron_sft.data.prepare import open_store, split_documents
from tests.functional.conftest import metrics_of


def test_the_test_share_is_not_trained(finetune, tmp_path):
    """23 rows: 18, 3 and 2."""
    flags = ["--packing", "none", "--num-epoch", "1", "--global-batch-size", "4", "--eval-iters", "-1"]
    done = finetune(*flags, "--split", "80,13,7", "--save", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics_of(tmp_path / "out")[-1]["consumed_samples"] == 18
    assert "--split 80,13,7: 18 rows to train on, 3 held out for validation, 2 held out for test (not read here)." in done.stdout


def test_four_shares_are_refused(finetune, tmp_path):
    done = finetune("--split", "70,10,10,10", "--num-epoch", "1", "--save", tmp_path / "out")
    assert done.returncode == 2 and "--split 70,10,10,10: expected shares of training, validation and test" in done.stdout


THINKING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m.reasoning_content and loop.index0 > messages|length - 2 %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def config_of(rows, tokenizer, cache):
    return DataConfig((str(rows),), split=(60, 20, 20), tokenizer_model=str(tokenizer), data_cache_path=str(cache), num_workers=1)


def assert_split_by_row(config, documents):
    """Documents of one row stand together; where() names the row."""
    store = open_store(config, config.train_data)
    assert len(store) == documents
    rows = [{store.where(int(i)) for i in part} for part in split_documents(config, store)]
    assert sum(map(len, rows)) == len(set.union(*rows)) == len({store.where(i) for i in range(len(store))})
    assert all(rows)


def test_pieces_of_a_long_row_stay_together(tiny_folder, rows_file, tmp_path):
    config = config_of(rows_file, tiny_folder, tmp_path)
    for number in range(3):
        assert_split_by_row(dataclasses.replace(config, seq_length=48, truncation="split", seed=number), 34)


def test_turns_of_an_expanded_conversation_stay_together(tiny_folder, tmp_path):
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(12):
            turns = [
                {"role": role, "content": f"{number} {turn}", **({"reasoning_content": "hm"} if role == "assistant" else {})}
                for turn in range(1 + number % 3)
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    config = config_of(tmp_path / "rows.jsonl", tiny_folder, tmp_path)
    assert_split_by_row(dataclasses.replace(config, history_thinking="expand", chat_template=THINKING), 24)
