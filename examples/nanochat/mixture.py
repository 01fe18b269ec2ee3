"""nanochat's mixture for supervised fine-tuning: writes what is no data set already, and prints the flags for finetune.py.

    flags=$(python examples/nanochat/mixture.py mixture --identity identity_conversations.jsonl)
    megatron-sft finetune HF_FOLDER $flags --seq-length 2048 --save out

| source | rows | passes |
|---|---|---|
| smoltalk | HuggingFaceTB/smol-smoltalk, or --smoltalk PLACE | 1 |
| identity | --identity FILE of {"messages": [...]}; left out without it | 2 |
| mmlu | cais/mmlu auxiliary_train, or --mmlu PLACE, as questions that a letter answers | --mmlu-epochs 3 |
| gsm8k | openai/gsm8k train, or --gsm8k PLACE, with its <<48/2=24>> as they are | --gsm8k-epochs 4 |
| simple-spelling | --simple-spelling 200000, generated | 1 |
| spelling-bee | --spelling-bee 80000, generated | 1 |

Proportions: https://github.com/karpathy/nanochat (scripts/chat_sft.py). The same tasks are asked by `--eval-tasks chatcore`; no
generated row is a question of its test.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_sft import entry
from megatron_sft.errors import ConfigError
from megatron_sft.output import write_output
from megatron_sft.tasks import choices, gsm8k, mmlu, spelling
from megatron_sft.tasks.question import LETTERS, hub_rows, require

Messages = list[dict[str, str]]


def turn(asked: str, answer: str) -> Messages:
    """A question and its answer."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def mmlu_rows(place: str) -> Iterator[Messages]:
    """As nanochat asks them: mmlu/nanochat."""
    for question in mmlu.training_questions(place):
        yield turn(choices.nanochat(question), LETTERS[int(question.answer)])


def gsm8k_rows(place: str) -> Iterator[Messages]:
    """Solutions with the calculator's turns: gsm8k/nanochat."""
    for where, row in hub_rows("gsm8k", place, "train", "main"):
        require(row, ("question", "answer"), where)
        yield turn(str(row["question"]), str(row["answer"]))


def spelling_rows(task: str, count: int, place: str) -> Iterator[Messages]:
    """Generated, with seeds from 0 on: those of a test begin at spelling.TEST_SEED."""
    words = spelling.read_words(place)
    make = spelling.bee if task == "spelling-bee" else spelling.simple
    yield from (spelling.conversation(make(words, seed)) for seed in range(count))


def made(folder: str, name: str, rows: Iterable[Messages]) -> str:
    """Writes one object a line, whole or not at all; the path."""
    path = str(Path(folder, f"{name}.jsonl"))
    write_output("OUT", path, "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in rows))
    return path


def sources(said: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """(name, place, passes) of each; what is left out by a 0 is not made."""
    yield "smoltalk", said.smoltalk, 1
    if said.identity:
        yield "identity", said.identity, 2
    if said.mmlu_epochs:
        yield "mmlu", made(said.out, "mmlu", mmlu_rows(said.mmlu)), said.mmlu_epochs
    if said.gsm8k_epochs:
        yield "gsm8k", made(said.out, "gsm8k", gsm8k_rows(said.gsm8k)), said.gsm8k_epochs
    for task, count in (("simple-spelling", said.simple_spelling), ("spelling-bee", said.spelling_bee)):
        if count:
            yield task, made(said.out, task, spelling_rows(task, count, said.words)), 1


def mixture(argv: Sequence[str], world_size: int) -> int:
    """Makes the files; prints the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder of the files that are made")
    parser.add_argument("--smoltalk", default="HuggingFaceTB/smol-smoltalk")
    parser.add_argument("--identity", default="")
    parser.add_argument("--mmlu", default="cais/mmlu")
    parser.add_argument("--gsm8k", default=gsm8k.HUB)
    parser.add_argument("--words", default="", help="of the spelling tasks, one a line")
    parser.add_argument("--mmlu-epochs", type=float, default=3)
    parser.add_argument("--gsm8k-epochs", type=float, default=4)
    parser.add_argument("--simple-spelling", type=int, default=200_000)
    parser.add_argument("--spelling-bee", type=int, default=80_000)
    said = parser.parse_args(argv)
    if min(said.mmlu_epochs, said.gsm8k_epochs, said.simple_spelling, said.spelling_bee) < 0:
        raise ConfigError(["mixture: a number below 0; expected 0 (left out) or more. Correct the flags."])
    try:
        Path(said.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"{said.out}: cannot be made ({error.strerror}); expected a folder. Name another."]) from None
    listed = list(sources(said))
    named = [word for name, place, _ in listed for word in (name, place)]
    print(shlex.join(["--prompt-data", *named, "--prompt-data-epochs", *(f"{passes:g}" for _, _, passes in listed)]))
    return 0


if __name__ == "__main__":
    entry.leave(entry.run(mixture, sys.argv[1:], to_stderr=True))
