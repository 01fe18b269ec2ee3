"""generate.py in a terminal: a conversation. What is typed is a user's message; the answer appears as it is generated.

1. rank 0 reads a line, which all ranks get;
2. the whole conversation goes through the chat template, as for any other prompt;
3. all ranks generate the answer, rank 0 shows it, and it becomes a message of the conversation.

/reset forgets the conversation, /exit and Ctrl-D end it, Ctrl-C ends an answer, a line that ends with \\ goes on in the next.
Not here: the model (generation.py), the template's use (prompts.py).
"""

import contextlib
import os
import select
import sys
import termios
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_sft.config.options import GenerateConfig
from megatron_sft.core_compat import device
from megatron_sft.data.schema import Message
from megatron_sft.environment import wants_colour
from megatron_sft.errors import DataError
from megatron_sft.inference.generation import Generation, answer_text, generate
from megatron_sft.inference.load import Inference
from megatron_sft.log import printable
from megatron_sft.parallel import from_first

HELP = "/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C ends an answer; \\ at the end of a line goes on in the next."
CTRL_C = "\x03"
GREY, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"

CUT = "[stopped]"
LIMIT = "[cut after {} tokens: --osl N allows more]"

Encode = Callable[[Sequence[Message]], list[int]]
"""Messages -> token ids of the prompt; DataError where the template refuses them."""


@dataclass(frozen=True)
class Turn:
    """A prompt of the conversation."""

    messages: list[Message]
    """Up to the user's."""
    prompt: list[int]
    """Token ids."""


class Terminal:
    """Where the person sits: standard input and output of rank 0. A context: the terminal's settings come back at its end.

    Ctrl-C is a key here, no signal: a launcher would end the ranks by it.
    """

    def __init__(self) -> None:
        self._input, self._has_colour = sys.stdin.fileno(), wants_colour(sys.stdout)

    def __enter__(self) -> "Terminal":
        with contextlib.suppress(ImportError):  # a Python without it has plain lines
            import readline

            readline.parse_and_bind(r'"\C-c": "\C-a\C-k\C-m"')  # empties the line
        self._before = termios.tcgetattr(self._input)
        self._set(is_answering=False)
        return self

    def __exit__(self, *_: Any) -> None:
        termios.tcsetattr(self._input, termios.TCSADRAIN, self._before)

    def _set(self, is_answering: bool) -> None:
        """Settings while a line is typed (echo, whole lines) or while an answer is shown (neither)."""
        mode = list(termios.tcgetattr(self._input))
        mode[6] = [*self._before[6]]
        mode[6][termios.VINTR] = os.fpathconf(self._input, "PC_VDISABLE").to_bytes(1, "big")
        flags = termios.ICANON | termios.ECHO
        mode[3] = mode[3] & ~flags if is_answering else mode[3] | flags
        termios.tcsetattr(self._input, termios.TCSADRAIN, mode)

    def ask(self) -> str | None:
        """A message that is typed, perhaps of several lines; None where the person ends the conversation."""
        lines: list[str] = []
        try:
            while not lines or lines[-1].endswith("\\"):
                lines.append(input(self._mark("> " if not lines else ". ")))
        except EOFError:
            print()
            return None
        return "\n".join([*(line[:-1] for line in lines[:-1]), lines[-1]]).replace(CTRL_C, "").strip()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within it `is_stopped` hears the keyboard."""
        self._set(is_answering=True)
        try:
            yield
        finally:
            self._set(is_answering=False)

    def is_stopped(self) -> bool:
        """Whether Ctrl-C was typed; what else was typed is left out."""
        typed = b""
        while select.select([self._input], [], [], 0)[0]:
            block = os.read(self._input, 1024)
            if not block:
                return True
            typed += block
        return CTRL_C.encode() in typed

    def _mark(self, text: str) -> str:
        """What stands before the line; readline counts no columns between \\1 and \\2."""
        return f"\1{BOLD}\2{text}\1{PLAIN}\2" if self._has_colour else text

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        print(f"{GREY}{text}{PLAIN}" if self._has_colour else text, flush=True)


class Stream:
    """Shows an answer as its tokens come: only whole characters, and none that drive the terminal.

    Args:
        decode: token ids -> text.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode, self._tokens = decode, list[int]()
        self._start = self._shown = 0  # tokens from _start on are decoded; those before _shown are on the screen

    def add(self, token: int) -> str:
        """The text that the token adds; nothing while a character is not whole."""
        self._tokens.append(token)
        return self._more(is_end=False)

    def end(self) -> str:
        return self._more(is_end=True)

    def _more(self, is_end: bool) -> str:
        before, after = self._decode(self._tokens[self._start : self._shown]), self._decode(self._tokens[self._start :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not is_end):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return printable(after[len(before) :])


class Conversation:
    """What rank 0 knows of it: the messages so far.

    Args:
        terminal: where the person sits.
        encode: through the template.
        options: no_chat_template: each line is continued for itself.
        max_positions: prompt and answer together are at most that long.
    """

    def __init__(self, terminal: Terminal, encode: Encode, options: GenerateConfig, max_positions: int | None):
        self._terminal, self._encode, self._options, self._max_positions = terminal, encode, options, max_positions
        self._messages: list[Message] = []

    def next_turn(self) -> Turn | None:
        """The next prompt; None where the person ends the conversation."""
        while (text := self._terminal.ask()) not in (None, "/exit"):
            if text == "/reset":
                self._messages = []
                self._terminal.note("forgotten.")
            elif not text:
                self._terminal.note(HELP)
            elif turn := self._turn([*self._messages, {"role": "user", "content": text}]):
                return turn
        return None

    def _turn(self, messages: list[Message]) -> Turn | None:
        try:
            prompt = self._encode(messages)
        except DataError as error:
            self._terminal.note(str(error))
            return None
        if self._max_positions and len(prompt) >= self._max_positions:
            self._terminal.note(f"the conversation has {len(prompt)} tokens; the model reads {self._max_positions}. Say /reset.")
            return None
        return Turn(messages, prompt)

    def take(self, turn: Turn, answer: str) -> None:
        """Remembers what was answered."""
        if not self._options.no_chat_template:
            self._messages = [*turn.messages, {"role": "assistant", "content": answer}]


def converse(
    loaded: Inference, options: GenerateConfig, encode: Encode, end_token_ids: Collection[int]
) -> list[tuple[Turn, Generation]]:
    """Talks until the person ends it. Collective; the terminal is rank 0's.

    Args:
        loaded: the model.
        options: osl, temperature, top_k, top_p and seed of each answer; no_chat_template.
        encode: through the template.
        end_token_ids: each ends an answer.

    Returns:
        Every turn with its answer, on every rank.
    """
    turns: list[tuple[Turn, Generation]] = []
    max_positions = loaded.model.max_position_embeddings or None
    with Terminal() if loaded.ranks.rank == 0 else contextlib.nullcontext() as terminal:
        told = Conversation(terminal, encode, options, max_positions) if terminal else None
        if terminal:
            terminal.note(f"{loaded.tokenizer_folder}. {HELP}")
        while turn := from_first(f"conversation/{len(turns)}", lambda: told.next_turn() if told else None):
            answer = _answer(loaded, turn, replace(options, seed=options.seed + len(turns)), end_token_ids, terminal)
            turns.append((turn, answer))
            if told:
                told.take(turn, answer_text(loaded.tokenizer, answer))
    return turns


def _answer(
    loaded: Inference, turn: Turn, options: GenerateConfig, end_token_ids: Collection[int], terminal: Terminal | None
) -> Generation:
    stream = Stream(lambda tokens: str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)))

    def on_token(_: int, token: int) -> bool:
        is_stopped = False
        if terminal:
            print(stream.add(token), end="", flush=True)
            is_stopped = terminal.is_stopped()
        if loaded.ranks.world_size == 1:
            return is_stopped
        flag = torch.tensor(int(is_stopped), device=device())
        dist.broadcast(flag, 0)
        return bool(flag)

    maximum = loaded.model.max_position_embeddings or None
    with terminal.answering() if terminal else contextlib.nullcontext():
        (answer,) = generate(loaded.chunks, [turn.prompt], options, end_token_ids, loaded.ranks, maximum, on_token, loaded.decode)
    if terminal:
        print(stream.end())
        if answer.finish_reason != "stop":
            terminal.note(CUT if answer.finish_reason == "cut" else LIMIT.format(len(answer.tokens)))
    return answer
