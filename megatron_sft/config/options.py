"""What the commands have beside a run: the flags of their own, and what --help says of each. Dataclasses as in run.py.

Not here: what --help looks like (help.py), what a command does (megatron_sft/__main__.py).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from megatron_sft.config.fields import Amount, Count, Number, Seed, Share
from megatron_sft.config.run import RunConfig


@dataclass(frozen=True)
class GenerateConfig:
    """What generate.py writes, to which prompts."""

    prompts_path: Annotated[str, "file"] | None = None
    """JSONL of messages, or text with one prompt a line; None: `prompt`, else standard input."""
    prompt: tuple[str, ...] = ()
    """Prompts of the command line."""
    osl: Annotated[Count, "tokens"] = 128
    """New ones a prompt at most."""
    temperature: Annotated[float, Number(1e-3, 100, also=(0,))] = 0.0
    """0: greedy."""
    top_p: Share = 1.0
    """Only the likeliest tokens that together have this probability are drawn."""
    top_k: Annotated[Amount, "tokens"] = 0
    """Only so many of the likeliest are drawn; 0: all."""
    seed: Seed = 1234
    """Of the drawn tokens."""
    batch_size: Annotated[Count, "prompts"] = 8
    """Generated together on one data-parallel rank."""
    output: Annotated[str, "file"] | None = None
    """JSONL file, one object a prompt."""
    fraction: Share = 1.0
    """Share of the prompts, from the first."""
    no_chat_template: bool = False
    """Prompts are continued as they are."""
    num_samples: Annotated[Count, "answers"] = 1
    """To each prompt."""
    stop: tuple[Annotated[str, "text"], ...] = ()
    """Each ends an answer, which is cut before it."""
    logprobs: bool = False
    """With each answer the logarithm of each new token's probability."""
    draft_length: Annotated[int, Number(0, 0)] = 0
    """Only 0: there is no speculative decoding here."""


@dataclass(frozen=True)
class ViewConfig:
    """What `megatron-sft preview` writes."""

    rows: Annotated[Amount, "rows"] = 2
    """Of each source that are shown."""
    html: Annotated[str, "file"] | None = None
    """File of the page, which needs no other."""


@dataclass(frozen=True)
class ReportConfig:
    """What `megatron-sft report` writes: of runs, or of data."""

    output: Annotated[str, "file"] | None = None
    """Page of the runs, which needs no other file; None: report.html."""
    html: Annotated[str, "file"] | None = None
    """Page of the data, without a RUN."""
    json: Annotated[str, "file"] | None = None
    """Figures of the data, without a RUN."""


@dataclass(frozen=True)
class PlanConfig:
    """What `megatron-sft plan` plans for."""

    gpus: Annotated[int, Number(1, 2**20)] = 1
    """GPUs, one process each."""
    gpu_memory: Annotated[float, Number(1e-3, 1e6), "GB"] = 80.0
    """Of one GPU, in 10^9 bytes."""
    json: Annotated[str, "file"] | None = None
    """File of all layouts."""


@dataclass(frozen=True)
class MMLUConfig:
    """How MMLU is scored."""

    mmlu_dataset: Annotated[str, "place"] = "cais/mmlu"
    """Folder, file or hub name (NAME:CONFIG; of cais/mmlu it is all)."""
    fraction: Share = 1.0
    """Share of each subject's questions."""
    few_shots: Annotated[int, Number(0, 5), "examples"] = 0
    """Before each question, from the dev split."""
    lower_bound: Annotated[float, Number(0, 1)] | None = None
    """Average below which the exit status is not 0."""
    mmlu_batch_size: Annotated[Count, "questions"] = 8
    """Scored together on one data-parallel rank."""
    output: Annotated[str, "file"] | None = None
    """JSON file of the scores."""


@dataclass(frozen=True)
class EvalConfig:
    """What `megatron-sft eval` writes and compares."""

    lower_bound: Annotated[float, Number(0, 1)] | None = None
    """Score of any task below which the exit status is not 0."""
    output: Annotated[str, "file"] | None = None
    """JSON file of the scores, the settings and each question's score."""
    answers: Annotated[str, "file"] | None = None
    """JSONL file, one object a question: prompt, answer and score."""
    compare: tuple[Annotated[str, "file"], ...] = ()
    """Two JSON files of --output: how much better the second is, question by question. No model is asked."""


@dataclass(frozen=True)
class DoctorConfig:
    """What `megatron-sft doctor` looks at."""

    processes: Annotated[Count, "processes"] = 1
    """Of the run; with a CONF those of TP, PP, CP, EP and DP."""
    doctor_rows: Annotated[Count, "rows"] = 200
    """Of each source that are looked at, from the first."""
    gpu_memory: Annotated[float, Number(1e-3, 1e6), "GB"] | None = None
    """Of one GPU, in 10^9 bytes; None: that of this machine."""


_NAMES: Mapping[str, str] = {
    "data": "data",
    "model": "model",
    "lora": "adapters",
    "parallel": "parallel",
    "optim": "optimizer",
    "train": "training",
    "checkpoint": "checkpoint",
    "tasks": "evaluation",
    "log": "logging",
}
_SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}
GROUPS: Mapping[str, str] = {
    name: _NAMES.get(name, name) for name in (*_NAMES, *sorted(_SECTIONS - _NAMES.keys())) if name in _SECTIONS
}
"""Section of RunConfig -> its name in --help, in this order. A flag stands where its field stands."""

FIRST = (
    "--load --tokenizer-model --finetune-hf-dataset --valid-data --seq-length --num-epoch --train-iters --global-batch-size "
    "--micro-batch-size --lr --bf16 --recompute-granularity --tensor-model-parallel-size --pipeline-model-parallel-size "
    "--use-distributed-optimizer --eval-iters --log-interval --save --save-interval --save-hf"
).split()
"""The flags that a person needs first, in this order."""
_MODEL = ("--load", "--tokenizer-model", "--bf16", "--fp32")
_CHAT = ("--chat-template", "--trust-remote-code")


@dataclass(frozen=True)
class Command:
    """What --help says of a command beside its flags."""

    does: str
    place: str = ""
    """What stands before the flags."""
    options: type | None = None
    groups: tuple[str, ...] = tuple(GROUPS)
    """Sections whose flags have an effect."""
    flags: tuple[str, ...] = ()
    """Flags of other sections that have one."""
    examples: tuple[str, ...] = ()


_LAYOUT = ("parallel",)
COMMANDS: Mapping[str, Command] = {
    "finetune": Command(
        "Trains a model on conversations.",
        "[CONF]",
        examples=(
            "megatron-sft finetune Qwen/Qwen3-0.6B --finetune-hf-dataset chats.jsonl --num-epoch 3",
            "megatron-sft finetune /path/to/hf-folder --finetune-hf-dataset chats.jsonl --save out --save-hf out-hf",
            "TP=2 DP=4 HF_MODEL_CKPT=/path/to/Qwen3-8B DATASET=chats.jsonl megatron-sft finetune Qwen/Qwen3-8B --lr 1e-5",
            "torchrun --nproc_per_node 8 finetune.py --load HF_FOLDER --train-data chats.jsonl --tensor-model-parallel-size 2",
        ),
    ),
    "prepare": Command(
        "Tokenises, masks and caches the data of a run ahead of time, without a GPU.",
        groups=("data",),
        examples=("megatron-sft prepare --tokenizer-model HF_FOLDER --train-data chats.jsonl --seq-length 4096",),
    ),
    "preview": Command(
        "Shows tokens, masks and packs as they are trained.",
        options=ViewConfig,
        groups=("data",),
        examples=("megatron-sft preview --tokenizer-model HF_FOLDER --train-data chats.jsonl --rows 3 --html rows.html",),
    ),
    "report": Command(
        "Makes one page of runs, by their --save folders; without one, counts rows, tokens, masks and packs of data.",
        "[RUN ...]",
        options=ReportConfig,
        groups=("data",),
        examples=(
            "megatron-sft report out --output out.html",
            "megatron-sft report out-1e-5 out-2e-5",
            "megatron-sft report --tokenizer-model HF_FOLDER --train-data chats.jsonl --json report.json",
        ),
    ),
    "generate": Command(
        "Answers prompts.",
        "[CONF]",
        GenerateConfig,
        _LAYOUT,
        (*_MODEL, *_CHAT, "--ckpt-step"),
        (
            'megatron-sft generate Qwen/Qwen3-0.6B --prompt "What is 2 + 2?"',
            "MLM_MODEL_CKPT=out megatron-sft generate Qwen/Qwen3-0.6B --prompts-path prompts.jsonl --output answers.jsonl",
        ),
    ),
    "mmlu": Command(
        "Scores MMLU.",
        "[CONF]",
        MMLUConfig,
        _LAYOUT,
        (*_MODEL, *_CHAT, "--ckpt-step"),
        ("MLM_MODEL_CKPT=out megatron-sft mmlu Qwen/Qwen3-0.6B --fraction 0.05 --output mmlu.json",),
    ),
    "eval": Command(
        "Scores a model on several tasks, or compares two files of scores.",
        "[CONF]",
        EvalConfig,
        ("tasks", *_LAYOUT),
        (*_MODEL, *_CHAT, "--ckpt-step"),
        (
            "megatron-sft eval Qwen/Qwen3-0.6B --eval-tasks mmlu/chat-letter gsm8k/chat --eval-max-problems 200 --output b.json",
            "megatron-sft eval --compare a.json b.json",
        ),
    ),
    "lm-eval": Command(
        "Lets lm-evaluation-harness ask a model, with its own flags (lm-eval run --help) beside these.",
        "MODEL",
        groups=_LAYOUT,
        flags=(*_MODEL, *_CHAT, "--ckpt-step"),
        examples=("megatron-sft lm-eval OUT --tasks arc_easy hellaswag --num_fewshot 5 --limit 100 --output_path scores",),
    ),
    "convert": Command(
        "HF folder, or Megatron checkpoint in any layout -> weights alone, as a Megatron checkpoint.",
        "[CONF]",
        groups=_LAYOUT,
        flags=(*_MODEL, "--save", "--verify-conversion", "--importer", "--ckpt-step", "--verify-integrity"),
        examples=("megatron-sft convert --load HF_FOLDER --save OUT", "TP=2 megatron-sft convert Qwen/Qwen3-8B --save OUT"),
    ),
    "export": Command(
        "Megatron checkpoint -> HF folder.",
        "[CONF]",
        groups=_LAYOUT,
        flags=("--load", "--tokenizer-model", "--save-hf", "--ckpt-step", "--verify-integrity", "--lora-load", "--lora-merge"),
        examples=("megatron-sft export --load OUT --tokenizer-model HF_FOLDER --save-hf OUT_HF",),
    ),
    "merge": Command(
        "Weights and a LoRA adapter -> HF folder of a plain model.",
        "BASE ADAPTER OUT",
        groups=_LAYOUT,
        flags=("--bf16", "--tokenizer-model", "--verify-integrity"),
        examples=("megatron-sft merge /path/to/hf-folder OUT OUT_HF",),
    ),
    "verify": Command(
        "Compares a checkpoint, or a conversion in memory, with transformers; exit status 1 if they differ.",
        "HF_FOLDER [MEGATRON_CHECKPOINT|ADAPTER]",
        groups=(),
        examples=("megatron-sft verify /path/to/hf-folder OUT",),
    ),
    "conf": Command(
        "Prints a conf/<org>/<model>.sh for an HF folder, or a model of the hub.",
        "FOLDER",
        groups=(),
        examples=("megatron-sft conf /path/to/hf-folder > conf/my-org/my-model.sh",),
    ),
    "plan": Command(
        "Which layouts fit, with memory and traffic.",
        "CONF",
        PlanConfig,
        ("parallel", "train", "optim"),
        ("--seq-length",),
        ("megatron-sft plan Qwen/Qwen3-8B --gpus 8 --gpu-memory 80 --seq-length 8192",),
    ),
    "doctor": Command(
        "Looks for what would go wrong with a run; one line a check, exit status 1 if any fails.",
        "[CONF]",
        DoctorConfig,
        examples=("HF_MODEL_CKPT=/path/to/Qwen3-8B DATASET=chats.jsonl TP=2 megatron-sft doctor Qwen/Qwen3-8B --lr 1e-5",),
    ),
}
"""In the order of `megatron-sft --help`."""
