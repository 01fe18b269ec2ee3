"""Conversation -> tokens and loss mask: the tokenizer's own template, exact masks, the user's policy.

1. the policy edits the messages (reasoning in the history, what is trained);
2. the template renders them once (templates.py), and the assistant's characters are found (spans.py);
3. the text is tokenised once; a token is trained when all its characters are;
Not here: the gate that tries all of it on real rows before a build (mask_gate.py).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.fast_bpe import HFText, NoPlaces, TextTokenizer, Tokens
from megatron_sft.data.limits import num_characters
from megatron_sft.data.literal import control_texts, literal_of, texts_in
from megatron_sft.data.schema import Row, RowError, valid_text
from megatron_sft.data.spans import Conversation, Undecided, assistant_spans, authors_of_text
from megatron_sft.data.templates import Span, Template, TemplateError, compile_apart
from megatron_sft.data.tokenizer import SlowText, load_tokenizer, special_texts
from megatron_sft.data.traced import OWN
from megatron_sft.data.trial import TimeIsUp, TrialError, clock, row_seconds
from megatron_sft.errors import ConfigError, DataError

__all__ = ["ChatEncoder", "Encoded", "Rendered", "load_tokenizer"]

P = TypeVar("P")
R = TypeVar("R")
EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")
KEEPS_THINKING: Mapping[str, Any] = {"preserve_thinking": True, "truncate_history_thinking": False, "clear_thinking": False}
"""Arguments by which some templates keep the reasoning of earlier answers (Qwen3.5, Nemotron 3, GLM 4.6)."""
REASONING_LEFT_OUT, CONTENT_LEFT_OUT, SPECIAL_SAID = "reasoning left out", "contents left out", "special tokens said"
NOTES: Mapping[str, str] = {
    CONTENT_LEFT_OUT: "what a system, user or tool message says is not in the text as it stands: the template leaves it out, "
    "cuts or rewrites it. preview shows how",
    REASONING_LEFT_OUT: "earlier answers are trained without their reasoning, which the chat template leaves out. "
    "--history-thinking expand trains each answer with its own",
    SPECIAL_SAID: "a message holds a special token, which counts as one. --special-in-content text makes it ordinary "
    "characters, error refuses the row",
}
"""What is no error, but counted by rows and told: what it means, and the way out."""
THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
TOOL_LEFT_OUT = (
    "the chat template leaves out the tool {}; expected every tool in the text. Take a template that knows tools, remove "
    "them from the row, or name another column with --tool-key."
)
FAILS = "the template fails"
"""Why a row is bad, where the template does not say so itself."""


@dataclass(frozen=True)
class Encoded:
    """One sample.

    Example: prompt of 2 tokens, answer of 2 with its end token -> loss_mask [0, 0, 1, 1].
    """

    tokens: np.ndarray
    """int32 [n]."""
    loss_mask: np.ndarray
    """uint8 [n], or float32 [n] where messages have weights: whether token i itself is trained (not shifted)."""


@dataclass(frozen=True)
class Rendered:
    """One sample as text."""

    text: str
    spans: tuple[tuple[int, int, float], ...]
    """(first character, one past the last, weight), in order, of what is trained."""
    route: str
    """How the spans were found (spans.ROUTES), or "all"."""
    notes: frozenset[str] = frozenset()
    """Of NOTES."""
    authors: str | None = None
    """Who wrote each character, where special tokens that somebody said are ordinary characters."""


class ChatEncoder:
    """Turns rows into tokens and masks.

    Args:
        tokenizer: from load_tokenizer.
        config: train_on, train_on_tool_calls, history_thinking, empty_thinking, special_in_content.

    Attributes:
        tokenise: text -> Tokens; a faster one may be put in its place.
        is_expendable: this process may be ended (SIGPROF) by a row that takes too long.
        literal: the same for texts in which special tokens are ordinary characters; None: they are not.
        routes: how many samples each route of spans.py decided.
        notes: how many rows NOTES tell of.

    Raises:
        ConfigError: there is no chat template, or it cannot be compiled.
    """

    def __init__(self, tokenizer: Any, config: DataConfig):
        template = tokenizer.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        if not template:
            raise ConfigError(
                [
                    f"{config.tokenizer_model}: the tokenizer has no chat template; expected one, which says how messages "
                    "become text. Take the -Instruct tokenizer of the family, or pass --chat-template FILE."
                ]
            )
        self.tokenizer, self.config = tokenizer, config
        self._names = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        try:
            compile_apart(template, self._names)
            self.template = Template(template, self._names)
        except TrialError as error:
            raise ConfigError(
                [f"{config.tokenizer_model}: the chat template {error}. Correct it, or pass --chat-template."]
            ) from None
        self.special = special_texts(tokenizer)
        self.tokenise: TextTokenizer = HFText(tokenizer) if tokenizer.is_fast else SlowText(tokenizer)
        self._control = re.compile("|".join(map(re.escape, control_texts(tokenizer))) or "(?!)")
        self.literal = literal_of(tokenizer, config.tokenizer_model) if config.special_in_content == "text" else None
        self._keeps = {name: value for name, value in KEEPS_THINKING.items() if re.search(rf"\b{name}\b", template)}
        self.routes: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.is_expendable = False

    def encode(self, row: Row) -> list[Encoded]:
        """Tokens and mask of a row; several samples with history_thinking=expand.

        Raises:
            RowError: the template refuses the row, which tokens are the assistant's cannot be decided exactly, or it takes too
                long. An expendable process ends where C code takes too long.
        """
        (found,) = self.encode_all([row])
        if isinstance(found, RowError):
            raise found
        return found

    def encode_all(self, rows: Sequence[Row]) -> list[list[Encoded] | RowError]:
        """What `encode` gives of each row, or raises.

        All are rendered before any is tokenised: in turns the template's code and the tokenizer's tables would push each other
        out of the processor's caches, and a short row would take an eighth longer. Each of the two has a row's time.
        """
        rendered = [self._in_time(row, self.render, row) for row in rows]
        return [
            texts if isinstance(texts, RowError) else self._in_time(row, self._encoded, texts)
            for row, texts in zip(rows, rendered, strict=True)
        ]

    def _encoded(self, texts: Sequence[Rendered]) -> list[Encoded]:
        return [self.encode_text(rendered) for rendered in texts]

    def _in_time(self, row: Row, work: Callable[[P], list[R]], part: P) -> list[R] | RowError:
        """What `work` makes of a row, or why it is a bad one."""
        allowed_s = row_seconds(num_characters([row.messages, row.tools, row.text]))
        try:
            with clock(allowed_s, self.is_expendable):
                return work(part)
        except RowError as error:
            return error
        except NoPlaces as error:
            return RowError(row.where, "no character places", str(error))
        except TimeIsUp:
            return RowError(
                row.where,
                "takes too long",
                f"the row takes more than {allowed_s:.1f} s to render, or to tokenise; expected far less. Correct or remove it, "
                "or pass another --chat-template.",
            )

    def encode_text(self, rendered: Rendered) -> Encoded:
        tokens = self.tokens_of(rendered)
        plain = all(weight == 1.0 for _, _, weight in rendered.spans)
        mask = np.zeros(len(tokens.ids), dtype=np.uint8 if plain else np.float32)
        for first, last, weight in rendered.spans:
            inside = slice(np.searchsorted(tokens.starts, first), np.searchsorted(tokens.ends, last, side="right"))
            mask[inside][tokens.ends[inside] > tokens.starts[inside]] = weight
        return Encoded(tokens.ids.astype(np.int32), mask)

    def tokens_of(self, rendered: Rendered) -> Tokens:
        if rendered.authors is not None and self.literal is not None:
            return self.literal(rendered.text, rendered.authors)
        return self.tokenise(rendered.text)

    def render(self, row: Row) -> list[Rendered]:
        """The text of every sample of a row and what of it is trained. Raises as `encode`."""
        if row.text is not None:
            text = row.text + (self.tokenizer.eos_token or "")
            return [Rendered(text, ((0, len(text), 1.0),), "all")]
        samples = [self.render_sample(messages, row, last) for messages, last in self.samples(row)]
        self.notes.update(frozenset().union(*(sample.notes for sample in samples)))
        return samples

    def template_kwargs(self, messages: Sequence[Mapping[str, Any]], row: Row) -> Mapping[str, Any]:
        """The row's template arguments; with those that keep the reasoning of earlier answers, where they have some."""
        if self.config.history_thinking not in ("keep", "mask") or not any(
            map(_thinks, messages[: max(_last_user(messages), 0)])
        ):
            return row.template_kwargs
        return {**self._keeps, **row.template_kwargs}

    def samples(self, row: Row) -> list[tuple[list[dict[str, Any]], bool]]:
        """(messages, only the last turn is trained) of each sample, after the reasoning policy."""
        messages = [dict(message) for message in row.messages]
        last_turn = self.config.train_on == "last-turn"
        if self.config.history_thinking == "drop":
            return [(_without_history_thinking(messages), last_turn)]
        if self.config.history_thinking == "expand" and any(_thinks(message) for message in messages):
            ends = [end for end in range(1, len(messages) + 1) if _turn_ends(messages, end)]
            return [(messages[:end], True) for end in (ends[-1:] if last_turn else ends)]
        return [(messages, last_turn)]

    def render_sample(self, messages: list[dict[str, Any]], row: Row, last_turn: bool) -> Rendered:
        kwargs = self.template_kwargs(messages, row)
        conversation = Conversation([for_template(m) for m in messages], row.tools, kwargs)
        special = self._special_said(conversation, row.where)
        authors, notes = None, {SPECIAL_SAID} if special else set()
        try:
            if self.config.train_on == "all":
                text, _ = self.template.render(conversation.messages, row.tools, kwargs)
                spans, route = [(0, len(text))], "all"
            else:
                text, spans, route = assistant_spans(self.template, conversation, self.special)
            if (special and self.literal) or self._may_mask_thinking(conversation.messages, text):
                authors = authors_of_text(self.template, conversation, text)
            valid_text(text, row.where)  # schema.py sees to the contents; tools and arguments are left
        except TemplateError as error:
            if error.is_fatal:  # not this row's fault
                raise DataError(f"{row.where}: the chat template {error}. Correct it, or pass another --chat-template.") from None
            raise RowError(
                row.where,
                "refused by the template" if error.is_refusal else FAILS,
                f"the chat template {error}. Expected a conversation that it "
                "renders; correct the row or pass another --chat-template.",
            ) from None
        except Undecided as error:
            raise RowError(
                row.where,
                "mask undecided",
                f"which tokens the assistant wrote cannot be decided exactly ({error}). "
                "Put {% generation %} blocks into the template and pass it with --chat-template, or correct the "
                f"row. The template begins {self.template.text[:80]!r}.",
            ) from None
        literal = authors if special and self.literal else None
        _check_tools(self.template, conversation, text, row.where)
        if any(_leaves_content_out(message, text) for message in conversation.messages):
            notes.add(CONTENT_LEFT_OUT)
        if route == "all":
            return Rendered(text, ((0, len(text), 1.0),), route, frozenset(notes), literal)
        _check_left_out(messages, spans, text, row.where)
        if self.config.history_thinking == "keep" and not last_turn and _leaves_reasoning_out(messages, spans, text):
            notes.add(REASONING_LEFT_OUT)
        self.routes[route] += 1
        trained = tuple(self._weighted(text, spans, messages, last_turn, authors))
        return Rendered(text, trained, route, frozenset(notes), literal)

    def _special_said(self, conversation: Conversation, where: str) -> bool:
        """Whether a message or a tool holds a special token; RowError where that is not allowed."""
        for number, message in enumerate([*conversation.messages, conversation.tools or []], start=1):
            special = next((match for text in texts_in(message) if (match := self._control.search(text))), None)
            if special is not None:
                if self.config.special_in_content == "error":
                    place = f"message {number}" if number <= len(conversation.messages) else "tools"
                    raise RowError(
                        where,
                        SPECIAL_SAID,
                        f"{place} holds the special token {special[0]}, as which it would count; expected text alone "
                        "(--special-in-content error). Remove it, or pass --special-in-content text.",
                    )
                return True
        return False

    def _may_mask_thinking(self, messages: Sequence[Mapping[str, Any]], text: str) -> bool:
        return self.config.empty_thinking == "mask" and "<think>" in text and not all(map(_thinks, _answers(messages)))

    def _weighted(
        self, text: str, spans: Sequence[Span], messages: list[dict[str, Any]], last_turn: bool, authors: str | None
    ) -> Iterable[tuple[int, int, float]]:
        """The spans that the policy trains, with the weights of their messages."""
        turn = _last_user(messages)
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for (first, last), index in zip(spans, assistants, strict=True):
            message = messages[index]
            weight = float(message.get("weight", 1.0)) if message.get("train", True) else 0.0
            calls = bool(message.get("tool_calls")) and not self.config.train_on_tool_calls
            if calls or not weight or (last_turn and index < turn):
                continue
            if self.config.empty_thinking == "mask" and authors is not None and not _thinks(message):
                first = _behind_empty_thinking(text, authors, first, last)
            if self.config.history_thinking == "mask" and index < turn:
                yield from ((a, b, weight) for a, b in _outside_thinking(text, first, last))
            else:
                yield (first, last, weight)


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without the keys that are ours, which a template must not see."""
    return {key: value for key, value in message.items() if key not in ("train", "weight")}


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [message for message in messages if message["role"] == "assistant"]


def _last_user(messages: Sequence[Mapping[str, Any]]) -> int:
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)


def _behind_empty_thinking(text: str, authors: str, first: int, last: int) -> int:
    """Where an answer begins behind an empty <think> block that the template itself wrote before it."""
    match = EMPTY_THINKING.match(text, first, last)
    own = len(authors[first : match.end()]) - len(authors[first : match.end()].lstrip(OWN)) if match else 0
    return first + own if match and "</think>" in text[first : first + own] else first


def _leaves_reasoning_out(messages: Sequence[Mapping[str, Any]], spans: Sequence[Span], text: str) -> bool:
    """Whether an answer before the last question, which is trained, has reasoning that is not in the text."""
    answers = [(index, message) for index, message in enumerate(messages) if message["role"] == "assistant"]
    return any(
        index < _last_user(messages)
        and message.get("train", True)
        and any(thought not in text[first:last] for thought in _thoughts(message))
        for (index, message), (first, last) in zip(answers, spans, strict=True)
    )


def _thoughts(message: Mapping[str, Any]) -> Iterable[str]:
    """The reasoning of an answer, without the white space around it."""
    thoughts = [message.get("reasoning_content"), message.get("thinking")]
    thoughts += [block[1] for block in THOUGHT.finditer(str(message.get("content") or ""))]
    return [thought.strip() for thought in thoughts if isinstance(thought, str) and thought.strip()]


def _check_left_out(messages: Sequence[Mapping[str, Any]], spans: Sequence[Span], text: str, where: str) -> None:
    """Refuses a row of which the template leaves out tool calls, or the last answer's reasoning, as some do, silently."""
    turn = _last_user(messages)
    assistants = [(i, message) for i, message in enumerate(messages) if message["role"] == "assistant"]
    for (index, message), (first, last) in zip(assistants, spans, strict=True):
        for call in message.get("tool_calls") or []:
            name = call.get("function", call).get("name")
            if str(name) not in text[first:last]:
                raise RowError(
                    where,
                    "tool call left out",
                    f"the chat template leaves out the tool call {name}; expected it in "
                    "the text. Take a template that knows tools, or write the call into the content.",
                )
        for key in ("reasoning_content", "thinking"):
            thought = message.get(key)
            is_last = index == assistants[-1][0] > turn  # gpt-oss drops the reasoning before a tool call once there is an answer
            if is_last and isinstance(thought, str) and thought.strip() not in text[first:last]:
                raise RowError(
                    where,
                    "reasoning left out",
                    f"the chat template leaves out {key} of message {index + 1}; "
                    "expected it. Take a template that knows it, remove it, or move it into the content.",
                )


def _check_tools(template: Template, conversation: Conversation, text: str, where: str) -> None:
    """Refuses a row of which the template leaves out tools: its answers would be trained without what they were given."""

    def without() -> str | None:
        try:
            return template.render(conversation.messages, None, conversation.kwargs)[0]
        except TemplateError:
            return None

    if name := tool_left_out(conversation.tools, conversation.messages, text, without):
        raise RowError(where, "tools left out", TOOL_LEFT_OUT.format(name))


def tool_left_out(
    tools: Sequence[Any] | None, messages: Sequence[Any], text: str, without: Callable[[], str | None]
) -> str | None:
    """The name of a tool that a template leaves out.

    Args:
        tools: of the conversation.
        messages: that may say the names of all tools, in which case the text proves nothing.
        text: what the template makes of it.
        without: makes the same without tools; None where the template fails then.
    """
    functions = [tool["function"] if isinstance(tool.get("function"), Mapping) else tool for tool in tools or ()]
    names = [str(function.get("name", "without a name")) for function in functions]
    left_out = [name for name in names if name not in text]
    said = " ".join(part for message in messages for part in texts_in(message)) if names and not left_out else ""
    if names and not left_out and all(name in said for name in names) and without() == text:
        left_out = names
    return left_out[0] if left_out else None


def _leaves_content_out(message: Mapping[str, Any], text: str) -> bool:
    """Whether somebody other than the assistant says what is neither in the text nor there as JSON."""
    content = message.get("content")
    if message["role"] == "assistant" or not isinstance(content, str):
        return False
    said = content.strip()
    return said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text


def _thinks(message: Mapping[str, Any]) -> bool:
    thinks = message.get("reasoning_content") or message.get("thinking") or "<think>" in str(message.get("content"))
    return message["role"] == "assistant" and bool(thinks)


def _turn_ends(messages: Sequence[Mapping[str, Any]], end: int) -> bool:
    """Messages[:end] ends with the assistant's last word before a user message or the end."""
    return messages[end - 1]["role"] == "assistant" and (end == len(messages) or messages[end]["role"] == "user")


def _without_history_thinking(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for message in messages[: max(_last_user(messages), 0)]:
        if message["role"] == "assistant":
            message.pop("reasoning_content", None)
            message.pop("thinking", None)
            message["content"] = THINKING.sub("", str(message.get("content") or ""))
    return messages


def _outside_thinking(text: str, first: int, last: int) -> Iterable[Span]:
    place = first
    for block in THINKING.finditer(text, first, last):
        yield (place, block.start())
        place = block.end()
    yield (place, last)
