"""Conversation -> tokens and loss mask: the tokenizer's own template, exact masks, the user's policy.

1. the policy edits the messages (reasoning in the history, what is trained);
2. the template renders them once (templates.py), and the assistant's characters are found (spans.py);
3. the text is tokenised once; a token is trained when all its characters are;
4. `check_masks` tries all of it on real rows before a build, and fails closed.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.fast_bpe import HFText, TextTokenizer
from megatron_sft.data.schema import Row, RowError
from megatron_sft.data.spans import Conversation, Undecided, assistant_spans
from megatron_sft.data.templates import Span, Template, TemplateError, limited, limited_time, probe
from megatron_sft.data.tokenizer import NoPlaces, SlowText, load_tokenizer, special_texts
from megatron_sft.errors import ConfigError, DataError

__all__ = ["ChatEncoder", "Encoded", "Rendered", "check_masks", "load_tokenizer"]

THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
CHECKED_ROWS = 32


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


class ChatEncoder:
    """Turns rows into tokens and masks.

    Args:
        tokenizer: from load_tokenizer.
        config: train_on, train_on_tool_calls, history_thinking.

    Attributes:
        tokenise: text -> Tokens; a faster one may be put in its place.
        routes: how many samples each route of spans.py decided.

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
            probe(template, self._names, ())
            self.template = Template(template, self._names)
        except TemplateError as error:
            raise ConfigError(
                [f"{config.tokenizer_model}: the chat template {error}. Correct it, or pass --chat-template."]
            ) from None
        self.special = special_texts(tokenizer)
        self.tokenise: TextTokenizer = HFText(tokenizer) if tokenizer.is_fast else SlowText(tokenizer)
        self.routes: Counter[str] = Counter()

    def encode(self, row: Row) -> list[Encoded]:
        """Tokens and mask of a row; several samples with history_thinking=expand.

        Raises:
            RowError: the template refuses the row, or which tokens are the assistant's cannot be decided exactly.
        """
        try:
            return [self._encoded(rendered) for rendered in self.render(row)]
        except NoPlaces as error:
            raise RowError(row.where, "no character places", str(error)) from None

    def _encoded(self, rendered: Rendered) -> Encoded:
        tokens = self.tokenise(rendered.text)
        plain = all(weight == 1.0 for _, _, weight in rendered.spans)
        mask = np.zeros(len(tokens.ids), dtype=np.uint8 if plain else np.float32)
        for first, last, weight in rendered.spans:
            inside = slice(np.searchsorted(tokens.starts, first), np.searchsorted(tokens.ends, last, side="right"))
            mask[inside][tokens.ends[inside] > tokens.starts[inside]] = weight
        return Encoded(tokens.ids.astype(np.int32), mask)

    def render(self, row: Row) -> list[Rendered]:
        """The text of every sample of a row and what of it is trained. Raises as `encode`."""
        if row.text is not None:
            return [Rendered(row.text + (self.tokenizer.eos_token or ""), ((0, len(row.text) + 10**6, 1.0),), "all")]
        return [self._render(messages, row, last) for messages, last in self._samples(row)]

    def _samples(self, row: Row) -> list[tuple[list[dict[str, Any]], bool]]:
        """(messages, only the last turn is trained) of each sample, after the reasoning policy."""
        messages = [dict(message) for message in row.messages]
        last_turn = self.config.train_on == "last-turn"
        if self.config.history_thinking == "drop":
            return [(_without_history_thinking(messages), last_turn)]
        if self.config.history_thinking == "expand" and any(_thinks(message) for message in messages):
            ends = [end for end in range(1, len(messages) + 1) if _turn_ends(messages, end)]
            return [(messages[:end], True) for end in (ends[-1:] if last_turn else ends)]
        return [(messages, last_turn)]

    def _render(self, messages: list[dict[str, Any]], row: Row, last_turn: bool) -> Rendered:
        conversation = Conversation([_for_template(m) for m in messages], row.tools, row.template_kwargs)
        try:
            if self.config.train_on == "all":
                text, _ = self.template.render(conversation.messages, row.tools, row.template_kwargs)
                text.encode()
                return Rendered(text, ((0, len(text), 1.0),), "all")
            text, spans, route = assistant_spans(self.template, conversation, self.special)
            text.encode()
        except TemplateError as error:
            if error.is_fatal:  # not this row's fault, and each one like it would take seconds
                raise DataError(f"{row.where}: the chat template {error}. Correct it, or pass another --chat-template.") from None
            raise RowError(
                row.where,
                "refused by the template",
                f"the chat template {error}. Expected a conversation that it "
                "renders; correct the row or pass another --chat-template.",
            ) from None
        except UnicodeEncodeError as error:  # schema.py sees to the contents; tools and arguments are left
            raise RowError(
                row.where,
                "lone surrogate",
                f"the text has a lone surrogate at character {error.start}; expected "
                "valid Unicode. Correct the escape \\ud800-\\udfff in the row.",
            ) from None
        except Undecided as error:
            raise RowError(
                row.where,
                "mask undecided",
                f"which tokens the assistant wrote cannot be decided exactly ({error}). "
                "Put {% generation %} blocks into the template and pass it with --chat-template, or correct the "
                f"row. The template begins {self.template.text[:80]!r}.",
            ) from None
        _check_left_out(messages, spans, text, row.where)
        self.routes[route] += 1
        return Rendered(text, tuple(self._weighted(text, spans, messages, last_turn)), route)

    def _weighted(
        self, text: str, spans: Sequence[Span], messages: list[dict[str, Any]], last_turn: bool
    ) -> Iterable[tuple[int, int, float]]:
        """The spans that the policy trains, with the weights of their messages."""
        turn = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for (first, last), index in zip(spans, assistants, strict=True):
            message = messages[index]
            weight = float(message.get("weight", 1.0)) if message.get("train", True) else 0.0
            calls = bool(message.get("tool_calls")) and not self.config.train_on_tool_calls
            if calls or not weight or (last_turn and index < turn):
                continue
            if self.config.history_thinking == "mask" and index < turn:
                yield from ((a, b, weight) for a, b in _outside_thinking(text, first, last))
            else:
                yield (first, last, weight)


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without the keys that are ours, which a template must not see."""
    return {key: value for key, value in message.items() if key not in ("train", "weight")}


def _check_left_out(messages: Sequence[Mapping[str, Any]], spans: Sequence[Span], text: str, where: str) -> None:
    """Refuses a row of which the template leaves out tool calls, or the last answer's reasoning, as some do, silently."""
    turn = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
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


def _thinks(message: Mapping[str, Any]) -> bool:
    thinks = message.get("reasoning_content") or message.get("thinking") or "<think>" in str(message.get("content"))
    return message["role"] == "assistant" and bool(thinks)


def _turn_ends(messages: Sequence[Mapping[str, Any]], end: int) -> bool:
    """Messages[:end] ends with the assistant's last word before a user message or the end."""
    return messages[end - 1]["role"] == "assistant" and (end == len(messages) or messages[end]["role"] == "user")


def _without_history_thinking(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    turn = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for message in messages[: max(turn, 0)]:
        if message["role"] == "assistant":
            message.pop("reasoning_content", None)
            message.pop("thinking", None)
            message["content"] = THINKING.sub("", str(message.get("content") or ""))
    return messages


def _outside_thinking(text: str, first: int, last: int) -> Iterable[Span]:
    place = first
    for found in THINKING.finditer(text, first, last):
        yield (place, found.start())
        place = found.end()
    yield (place, last)


def check_masks(encoder: ChatEncoder, rows: Iterable[Row], source: str) -> Counter[str]:
    """The gate before a build: on real rows, template, tokens and masks fit together. Fails closed.

    1. the template renders within limits of time and memory, in a process of its own;
    2. the tokens are those of tokenizer.apply_chat_template;
    3. each trained stretch ends with the end-of-turn token, which is trained whatever the pad token is;
    4. nothing before the first assistant message is trained.

    Args:
        encoder: to be checked.
        rows: of one source; the first CHECKED_ROWS are looked at.
        source: its name, for messages.

    Returns:
        Samples by the route of spans.py that decided them.

    Raises:
        ConfigError: the template runs away.
        DataError: a row for which one of these does not hold.
    """
    sample = [row for row in itertools.islice(rows, CHECKED_ROWS) if row.text is None]
    if not sample:
        return Counter()
    conversations = [([_for_template(m) for m in row.messages], row.tools, row.template_kwargs) for row in sample]
    try:
        probe(encoder.template.text, encoder._names, conversations)
        return Counter(limited(lambda: _check_rows(encoder, sample), None))
    except TemplateError as error:
        raise ConfigError(
            [f"{encoder.config.tokenizer_model}: the chat template {error}. Correct it, or pass --chat-template."]
        ) from None


def _check_rows(encoder: ChatEncoder, rows: Iterable[Row]) -> Counter[str]:
    encoder.template.is_expendable = True
    encoder.routes.clear()
    for row in rows:
        try:
            _check_row(encoder, row)
        except (RowError, NoPlaces):
            continue  # counted and reported by the build, which sees every row
    return encoder.routes


def _check_row(encoder: ChatEncoder, row: Row) -> None:
    for messages, last in encoder._samples(row):
        rendered = encoder._render(messages, row, last)
        encoded = encoder._encoded(rendered)
        said = [_for_template(m) for m in messages]
        with limited_time(encoder.template.is_expendable):  # transformers computes a template's constants as it compiles
            encoder.tokenizer.apply_chat_template(said, tools=row.tools, tokenize=False, **row.template_kwargs)
        expected = encoder.tokenizer.apply_chat_template(
            said, tools=row.tools, tokenize=True, return_dict=False, **row.template_kwargs
        )
        if list(expected) != encoded.tokens.tolist():
            raise DataError(
                f"{row.where}: our tokens are not those of tokenizer.apply_chat_template ({len(encoded.tokens)} against "
                f"{len(expected)}). Expected the same; report the template. Text: {rendered.text[:200]!r}"
            )
        if rendered.route == "all":
            continue
        outside = np.ones(len(encoded.tokens), dtype=bool)
        tokens = encoder.tokenise(rendered.text)
        for first, end, _ in rendered.spans:
            inside = np.flatnonzero((tokens.starts >= first) & (tokens.ends <= end) & (tokens.ends > tokens.starts))
            outside[inside] = False
            if first < end and not (len(inside) and encoded.loss_mask[inside[-1]] and tokens.ends[inside[-1]] == end):
                raise DataError(
                    f"{row.where}: the end of the answer {rendered.text[first:end][-40:]!r} is not trained, so that the model "
                    "would never stop. Expected a token of its own for it; report the template and the tokenizer."
                )
        if encoded.loss_mask[outside].any():
            raise DataError(
                f"{row.where}: a token outside the assistant's messages is trained; expected none. Report the template."
            )
