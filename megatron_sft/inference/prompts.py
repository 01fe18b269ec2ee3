"""Prompts in, answers out: what generate.py reads and writes around generation.py."""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from megatron_sft import parallel
from megatron_sft.config.fields import range_problems
from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.run import DataConfig, RunConfig
from megatron_sft.data.chat import TOOL_LEFT_OUT, tool_left_out
from megatron_sft.data.schema import Message, prompt_of, valid_text
from megatron_sft.data.sources import ENDINGS, open_source
from megatron_sft.errors import ConfigError, DataError
from megatron_sft.inference.conversation import converse
from megatron_sft.inference.generation import Generation, answer_text, generate
from megatron_sft.inference.load import Inference, load_for_inference
from megatron_sft.log import logger
from megatron_sft.output import output_problems, write_output

STANDARD_INPUT = "standard input"
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Prompt:
    """One prompt and where it stands."""

    messages: list[Message]
    where: str
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def answer_prompts(
    run: RunConfig, explicit: frozenset[str], options: GenerateConfig, show: Callable[[Sequence[dict[str, Any]]], None]
) -> None:
    """Everything that generate.py does, from flags to answers; in a terminal, with no prompt given, a conversation. Collective.

    Args:
        run: as the flags say it.
        explicit: ModelConfig fields that a flag set.
        options: what is asked, and where answers go.
        show: gets the answer_rows on rank 0, unless the person at the terminal has seen them.
    """
    first = parallel.process_environment()[0] == 0
    check_options(options)
    talks = first and prompts_place(options, run.data) is None and sys.stdin.isatty() and sys.stdout.isatty()
    prompts = read_prompts(options, run.data) if first and not talks else []  # a mistake shows before the weights are read
    if talks and options.num_samples > 1:
        raise ConfigError(["--num-samples: a conversation goes on from one answer; expected 1. Leave it out, or pass --prompt."])
    loaded = load_for_inference(run, explicit)
    if parallel.gather(talks)[0]:
        rows = _talk(loaded, options)
    else:
        rows = _answer(loaded, options, prompts)
        if first:
            show(rows)
    parallel.finalize()
    if first:
        write_answers(rows, options)


def _answer(loaded: Inference, options: GenerateConfig, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Collective: the answer_rows on rank 0; nothing elsewhere."""
    encoded = parallel.gather(parallel.agree(lambda: encode_prompts(loaded.tokenizer, prompts, not options.no_chat_template)))[0]
    ends = end_token_ids(loaded.tokenizer, loaded.tokenizer_folder, not options.no_chat_template)
    start = time.monotonic()
    limit = loaded.model.max_position_embeddings or None
    answers = generate(loaded.chunks, encoded, options, ends, loaded.ranks, limit, decode=loaded.decode)
    seconds, total = time.monotonic() - start, sum(len(answer.tokens) for answer in answers)
    logger.info("%d prompts, %d tokens in %.1f s: %.1f tokens/s", len(answers), total, seconds, total / seconds)
    return answer_rows(loaded.tokenizer, prompts, encoded, answers) if loaded.ranks.rank == 0 else []


def _talk(loaded: Inference, options: GenerateConfig) -> list[dict[str, Any]]:
    """Collective: a conversation's turns as answer_rows, on every rank."""
    use_template = not options.no_chat_template

    def encode(messages: Sequence[Message]) -> list[int]:
        return encode_prompts(loaded.tokenizer, [Prompt([*messages], "conversation")], use_template)[0]

    encode([{"role": "user", "content": "a"}])  # a tokenizer without a template is told of at once
    ends = end_token_ids(loaded.tokenizer, loaded.tokenizer_folder, use_template)
    turns = converse(loaded, options, encode, ends)
    prompts = [Prompt(turn.messages, "conversation") for turn, _ in turns]
    return answer_rows(loaded.tokenizer, prompts, [turn.prompt for turn, _ in turns], [answer for _, answer in turns])


def prompts_place(options: GenerateConfig, config: DataConfig) -> str | None:
    """The file of --prompts-path, or "--prompt", or else the training data; None: standard input."""
    if options.prompts_path is None and options.prompt:
        return "--prompt"
    return options.prompts_path or (config.train_data[0] if config.train_data else None)


def write_answers(rows: Sequence[dict[str, Any]], options: GenerateConfig) -> None:
    """Writes answer_rows to --output where that is given, one JSON object a line."""
    if options.output and rows:
        write_output("--output", options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_options(options: GenerateConfig) -> None:
    """Raises ConfigError with every option that makes no sense."""
    problems = range_problems(options) + output_problems("--output", options.output)
    if options.output and options.prompts_path and os.path.realpath(options.output) == os.path.realpath(options.prompts_path):
        problems.append(
            f"--output {options.output} is --prompts-path too, which it would replace; expected another file. Name one."
        )
    if "" in options.stop:
        problems.append("--stop has an empty text; expected one that can come in an answer. Leave it out.")
    if problems:
        raise ConfigError(problems)


def read_prompts(options: GenerateConfig, config: DataConfig) -> list[Prompt]:
    """The prompts of --prompts-path, else of --prompt, else of the training data flags, else of standard input.

    Raises:
        DataError: there is none, or a row has no messages; the message names file and line.
    """
    path = prompts_place(options, config)
    if path == "--prompt":
        prompts = [Prompt([{"role": "user", "content": text}], path) for text in options.prompt]
    elif path is None:
        path = STANDARD_INPUT
        logger.info("reading prompts from standard input, one per line, to its end%s", " (Ctrl-D)" if sys.stdin.isatty() else "")
        prompts = _from_lines(_text_lines(path), path)
    elif os.path.isfile(path) and not any(ending in os.path.basename(path) for ending in ENDINGS):
        prompts = _from_lines(_text_lines(path), path)
    else:
        rows = [prompt_of(record, where, config) for where, record in open_source(path, config)]
        prompts = [Prompt(row.messages, row.where, row.tools, row.template_kwargs) for row in rows]
    if not prompts:
        raise DataError(f"{path}: has no prompt; expected at least one. Pass --prompt TEXT or fill the file.")
    return list(itertools.islice(prompts, math.ceil(len(prompts) * options.fraction)))


def _text_lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") if path != STANDARD_INPUT else nullcontext(sys.stdin) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); expected one prompt a line. Convert the file.") from None


def _from_lines(lines: Iterable[str], path: str) -> list[Prompt]:
    """One prompt a line; blank lines are none."""
    numbered = ((number, line.rstrip("\r\n")) for number, line in enumerate(lines, start=1))
    return [Prompt([{"role": "user", "content": line}], f"{path}:{number}") for number, line in numbered if line.strip()]


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], use_template: bool) -> list[list[int]]:
    """Token ids of each prompt, through the chat template with its generation prompt, or as raw text.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: the template refuses a prompt.
    """
    if use_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            [
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; expected one. "
                "Pass --no-chat-template or --chat-template."
            ]
        )
    return [_encode(tokenizer, prompt, use_template) for prompt in prompts]


def _encode(tokenizer: Any, prompt: Prompt, use_template: bool) -> list[int]:
    if not use_template:
        text = "\n".join(str(m["content"]) for m in prompt.messages)
        return list(tokenizer(valid_text(text, prompt.where))["input_ids"])
    settings: dict[str, Any] = dict(tokenize=False, add_generation_prompt=True, **prompt.template_kwargs)

    def render(tools: Sequence[Any] | None) -> str:
        return str(tokenizer.apply_chat_template(prompt.messages, tools=tools, **settings))

    try:
        text = render(prompt.tools)
    except TEMPLATE_ERRORS as error:
        raise DataError(
            f"{prompt.where}: the chat template refuses the messages ({error}); expected roles that it knows. Rewrite the row."
        ) from None
    if name := tool_left_out(prompt.tools, prompt.messages, text, lambda: render(None)):
        raise DataError(f"{prompt.where}: {TOOL_LEFT_OUT.format(name)}")
    return list(tokenizer(valid_text(text, prompt.where), add_special_tokens=False)["input_ids"])


def end_token_ids(tokenizer: Any, folder: str | Path, use_template: bool = True) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, generation_config.json's and the chat template's end of turn.

    Args:
        tokenizer: a Hugging Face tokenizer.
        folder: HF folder; need not have a generation_config.json.
        use_template: also the token with which the chat template ends a turn.
    """
    ends = {tokenizer.eos_token_id} - {None}
    file = Path(folder) / "generation_config.json"
    if file.is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ends |= set(named if isinstance(named, list) else [named]) - {None}
    if use_template and getattr(tokenizer, "chat_template", None):
        marker = "the answer"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(marker)[2].lstrip()
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in tokenizer.added_tokens_decoder:
            ends.add(ids[0])
    return frozenset(ends)


def answer_rows(
    tokenizer: Any, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]], answers: Sequence[Generation]
) -> list[dict]:
    """One JSON-able object an answer: prompt (as the model saw it), messages, response, tokens, finish_reason.

    Where asked for also logprobs, and with several answers a prompt sample, which counts them from 0.
    """
    rows, samples = [], len(answers) // max(len(prompts), 1)
    for number, answer in enumerate(answers):
        index = number // samples
        row = {
            "prompt": tokenizer.decode(encoded[index], skip_special_tokens=False),
            "messages": prompts[index].messages,
            "response": answer_text(tokenizer, answer),
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
        }
        row |= {"logprobs": answer.logprobs} if answer.logprobs else {}
        rows.append(row | ({"sample": number % samples} if samples > 1 else {}))
    return rows
