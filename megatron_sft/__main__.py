"""The command line: `megatron-sft COMMAND [flags]`, or `python -m megatron_sft COMMAND [flags]`.

A first word that is no flag is a conf for the commands that are scripts too (shell.py); flags are read by arguments.py.
Not here: what a command does; each is one function elsewhere.
"""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from megatron_sft import entry, hub, shell
from megatron_sft.config.arguments import parse, read_flags
from megatron_sft.config.fields import flag_of
from megatron_sft.config.help import ASKS, divided, help_of, overview
from megatron_sft.config.options import (
    DoctorConfig,
    EvalConfig,
    GenerateConfig,
    MMLUConfig,
    PlanConfig,
    ReportConfig,
    ViewConfig,
)
from megatron_sft.config.run import RunConfig
from megatron_sft.core_compat import leave_out_compiler
from megatron_sft.environment import wants_colour
from megatron_sft.errors import ConfigError
from megatron_sft.output import output_problems, write_output


def finetune(argv: Sequence[str], world_size: int) -> int:
    """Trains: the flags of finetune.py."""
    run, explicit = parse(argv, world_size)
    run = hub.fetched(run)
    leave_out_compiler()
    from megatron_sft.train.setup import finetune as train

    return train(run, explicit)


def prepare(argv: Sequence[str], world_size: int) -> int:
    """Tokenises, masks and caches the data of a run ahead of time, without a GPU: the flags of finetune.py."""
    run, _, _ = parse(argv, world_size, options=ViewConfig)
    run = hub.fetched(run, weights=False)
    from megatron_sft.data.prepare import VALID_SPLITS, open_store, training_set
    from megatron_sft.data.report import as_table, data_report

    store, plan = training_set(run.data)
    print(as_table(data_report(store, plan, run.data.seq_length)))
    print(f"token store: {store.folder}")
    if run.data.valid_data:
        print(f"token store of the validation data: {open_store(run.data, run.data.valid_data, splits=VALID_SPLITS).folder}")
    return 0


def preview(argv: Sequence[str], world_size: int) -> int:
    """Shows tokens, masks and packs as they are trained: the flags of finetune.py [--rows N --html FILE]."""
    run, _, options = parse(argv, world_size, options=ViewConfig)
    _check_outputs(html=options.html)
    run = hub.fetched(run, weights=False)
    from megatron_sft.data.chat import load_tokenizer
    from megatron_sft.data.prepare import training_set
    from megatron_sft.data.preview import as_html, as_text, decoder, shown_documents

    store, plan = training_set(run.data)
    shown, decode = shown_documents(store, options.rows), decoder(load_tokenizer(run.data))
    print(as_text(store, plan, shown, decode, wants_colour(sys.stdout)))
    if options.html:
        write_output("--html", options.html, as_html(store, plan, shown, decode, run.data.seq_length))
    return 0


def report(argv: Sequence[str], world_size: int) -> int:
    """One page of runs: RUN [RUN ...] [--output FILE]. Without a RUN figures of data: its flags [--json FILE --html FILE]."""
    if argv and not argv[0].startswith("-"):
        return _report_runs(argv)
    run, _, options = parse(argv, world_size, options=ReportConfig)
    if options.output:
        raise ConfigError([f"--output {options.output}: the page of runs; expected one before it. Name a RUN, or use --html."])
    _check_outputs(html=options.html, json=options.json)
    from megatron_sft.pages.figures import require_matplotlib

    if options.html:
        require_matplotlib("--html")
    run = hub.fetched(run, weights=False)
    from megatron_sft.data.prepare import training_set
    from megatron_sft.data.report import as_html, as_json, as_table, data_report

    store, plan = training_set(run.data)
    figures = data_report(store, plan, run.data.seq_length)
    print(as_table(figures))
    for flag, path, text in (("--json", options.json, as_json), ("--html", options.html, as_html)):
        if path:
            write_output(flag, path, text(figures))
    return 0


def _report_runs(argv: Sequence[str]) -> int:
    places = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    values, problems = read_flags(argv[len(places) :], ReportConfig)
    problems += [
        f"{flag_of(path.split('.')[1])} has no effect on the page of a RUN. Leave it out."
        for path in values
        if path != "own.output"
    ]
    output = str(values.get("own.output", "report.html"))
    if os.path.isfile(output) and os.path.getsize(output) and not _is_page(output):
        problems.append(f"--output {output}: holds something other than a page; expected a new file, or a page. Choose another.")
    if problems := problems + output_problems("--output", output):
        raise ConfigError(problems)
    from megatron_sft.pages.figures import require_matplotlib

    require_matplotlib("megatron-sft report RUN")
    from megatron_sft.report.page import run_page
    from megatron_sft.report.runs import read_runs

    write_output("--output", output, run_page(read_runs(places)))
    return 0


def _is_page(path: str) -> bool:
    """Whether an older page stands there, which a new one may replace; metrics.jsonl and the like it may not."""
    with open(path, "rb") as file:
        return file.read(15).lower() == b"<!doctype html>"


def _check_outputs(**outputs: str | None) -> None:
    """Raises ConfigError where one of the files could not be written, before there is anything to write."""
    if problems := [problem for name, path in outputs.items() for problem in output_problems(f"--{name}", path)]:
        raise ConfigError(problems)


def generate(argv: Sequence[str], world_size: int) -> int:
    """Answers prompts into --output FILE.jsonl."""
    run, explicit, options = parse(argv, world_size, options=GenerateConfig)
    run = hub.fetched(run)
    leave_out_compiler()
    from megatron_sft.inference.prompts import answer_prompts

    answer_prompts(run, explicit, options, lambda rows: print(*(row["response"] for row in rows), sep="\n"))
    return 0


def mmlu(argv: Sequence[str], world_size: int) -> int:
    """Scores MMLU: --load MODEL [--mmlu-dataset FOLDER --fraction F --few-shots N --lower-bound X --output JSON]."""
    run, explicit, options = parse(argv, world_size, options=MMLUConfig)
    run = hub.fetched(run)
    leave_out_compiler()
    from megatron_sft.tasks.evaluation import evaluate_mmlu

    return evaluate_mmlu(run, explicit, options)


def eval(argv: Sequence[str], world_size: int) -> int:
    """Scores tasks: --load MODEL --eval-tasks NAME ... [--output JSON --answers JSONL]; or --compare A.json B.json."""
    run, explicit, options = parse(argv, world_size, options=EvalConfig)
    run = run if options.compare else hub.fetched(run)
    leave_out_compiler()
    from megatron_sft.tasks.evaluation import evaluate

    return evaluate(run, explicit, options)


def lm_eval(argv: Sequence[str], world_size: int) -> int:
    """lm-evaluation-harness asks a model: PLACE [our flags] and the flags of `lm-eval run`."""
    named = ["--load"] if argv and not argv[0].startswith("-") else []
    ours, theirs = divided([*named, *argv], "lm-eval")
    from megatron_sft.tasks.harness import ask_harness, require_harness

    require_harness()
    run, explicit = _model_run(ours, world_size, "load")
    return ask_harness(hub.fetched(run), explicit, theirs)


def convert(argv: Sequence[str], world_size: int) -> int:
    """HF folder, or Megatron checkpoint in any layout -> weights alone: --load PLACE --save ROOT [--no-verify-conversion]."""
    run, explicit = _model_run(argv, world_size, "load", "save")
    from megatron_sft.conversion import convert as write

    write(hub.fetched(run), explicit)
    return 0


def export(argv: Sequence[str], world_size: int) -> int:
    """Megatron checkpoint -> HF folder: --load ROOT --save-hf FOLDER [--tokenizer-model HF_FOLDER]."""
    run, explicit = _model_run(argv, world_size, "load", "save_hf")
    from megatron_sft.conversion import export as write

    write(hub.fetched(run), explicit)
    return 0


def merge(argv: Sequence[str], world_size: int) -> int:
    """Weights and a LoRA adapter -> HF folder of a plain model: BASE ADAPTER OUT [--bf16 and layout flags]."""
    places = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if len(places) != 3:
        raise ConfigError([f"merge: {len(places)} places; expected BASE ADAPTER OUT, then flags. See --help."])
    named = [word for pair in zip(("--load", "--lora-load", "--save-hf"), places, strict=True) for word in pair]
    run, _ = _model_run([*named, *argv[3:]], world_size)
    from megatron_sft.conversion import merge as write

    write(run)
    return 0


def verify(argv: Sequence[str], world_size: int) -> int:
    """Compares with transformers: HF_FOLDER [MEGATRON_CHECKPOINT|ADAPTER]; exit status 1 if they differ."""
    places = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    named = [word for pair in zip(("--tokenizer-model", "--load"), places, strict=False) for word in pair]
    run, _ = _model_run([*named, *argv[len(places) :]], world_size)
    folder, checkpoint = run.data.tokenizer_model, run.checkpoint.load
    if not folder or len(places) > 2:
        raise ConfigError(
            [f"verify: {len(places)} places; expected HF_FOLDER and perhaps a checkpoint or an adapter. See --help."]
        )
    from megatron_sft.conversion import verify as same

    folder = hub.folder("verify", folder, weights=True)
    return 0 if same(folder, checkpoint if checkpoint != folder else None, run.checkpoint.ckpt_step) else 1


def conf(argv: Sequence[str], world_size: int) -> int:
    """Prints a conf/<org>/<model>.sh for an HF folder or a model of the hub: FOLDER or NAME."""
    named = ["--load"] if argv and not argv[0].startswith("-") else []
    run, _ = _model_run([*named, *argv], world_size, "load")
    from megatron_sft.hf.conf import conf_of_folder  # without torch: conf/arguments.sh waits for it

    name = str(run.checkpoint.load)
    print(conf_of_folder(hub.folder("--load", name, weights=False), name), end="")
    return 0


def plan(argv: Sequence[str], world_size: int) -> int:
    """Which layouts fit, with memory and traffic: CONF --gpus N --gpu-memory GB [--json FILE] [flags of finetune.py]."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError(["plan: no model named; expected a conf such as Qwen/Qwen3-8B, or an HF folder, before the flags."])
    from megatron_sft import plan as planning

    needed = ["--use-distributed-optimizer"]
    if os.path.isfile(os.path.join(argv[0], "config.json")):
        needed += ["--load", argv[0]]
    run, given, options = parse([*needed, *planning.conf_flags(argv[0]), *argv[1:]], world_size, options=PlanConfig)
    _check_outputs(json=options.json)
    train = dataclasses.replace(run.train, kernels="auto", attention_backend="auto")  # what the machine has that trains
    rows = planning.plan(dataclasses.replace(run, train=train), given, options, argv[0], planning.run_flags(argv[1:]))
    print(planning.as_table(rows, options))
    if options.json:
        write_output("--json", options.json, planning.as_json(rows))
    planning.refuse_if_none_fits(rows, options)
    return 0


def doctor(argv: Sequence[str], world_size: int) -> int:
    """Looks for what would go wrong: [CONF] [flags of finetune.py]."""
    words = [word for word in argv if not word.endswith("finetune.py")]  # conf/arguments.sh has it behind the launcher
    processes = read_flags(words, DoctorConfig)[0].get("own.processes", 1)
    leave_out_compiler()
    from megatron_sft.doctor import examine

    def read() -> tuple[RunConfig, frozenset[str], DoctorConfig]:
        run, explicit, options = parse(words, processes, options=DoctorConfig)
        return hub.fetched(run), explicit, options

    return examine(read)


def _model_run(argv: Sequence[str], world_size: int, *needed: str) -> tuple[RunConfig, frozenset[str]]:
    """The configuration of a command that trains nothing; `needed` fields of its checkpoint section must be given."""
    run, explicit = parse(argv, world_size, training=False)
    missing = [f"--{name.replace('_', '-')} is missing: see --help." for name in needed if not getattr(run.checkpoint, name)]
    if missing:
        raise ConfigError(missing)
    leave_out_compiler()
    return run, explicit


def by_script(name: str, argv: Sequence[str], world_size: int) -> int:
    """A command whose first word is a conf or an HF folder."""
    if world_size > 1:
        raise ConfigError(
            [
                f"megatron-sft {name} {argv[0]} starts its processes itself, as many as TP, PP, CP and DP say; expected no "
                "launcher around it. Start it alone, or give torchrun the flags without a conf."
            ]
        )
    shell.run(name, argv)


COMMANDS: Mapping[str, Callable[[Sequence[str], int], int]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(finetune, prepare, preview, report, generate, mmlu, eval, lm_eval),
        *(convert, export, merge, verify, conf, plan, doctor),
    )
}


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    name, words = (argv[0], argv[1:]) if argv else ("", [])
    command = COMMANDS.get(name)
    if command is None:
        asked = name in ("-h", *ASKS)
        print(overview("" if asked else name, argv), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else ConfigError.exit_status
    names_conf = name in shell.SCRIPTS and bool(words) and not words[0].startswith("-") and not help_of(name, words)
    answers = name in ("generate", "conf")  # what they print is for a file or a pipe
    return entry.run(functools.partial(by_script, name) if names_conf else command, words, to_stderr=answers)


def run() -> None:
    """Entry point of the installed `megatron-sft` script."""
    entry.leave(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
