"""Which characters of a rendered conversation the assistant wrote. Exact, or an error; never a guess.

Three routes, in this order; the first that can decide does:
1. generation: the template says it itself with {% generation %} blocks;
2. prefix: the conversation up to each assistant message, rendered with and without it, brackets the message, where
   both renders are prefixes of the whole text;
3. boundaries: the text between the assistant's header (what add_generation_prompt adds) and the end-of-turn token, for
   templates that render a message otherwise once others follow it (Qwen3 drops old <think> blocks).
A span holds the message and its end-of-turn token, not the header before nor the newline after.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sft.data.templates import Span, Template, TemplateError

ROUTES = ("generation", "prefix", "boundaries")


class Undecided(Exception):
    """A route cannot tell exactly; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """What a template renders."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    kwargs: Mapping[str, Any]

    def assistants(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def assistant_spans(template: Template, conversation: Conversation, special: Sequence[str]) -> tuple[str, list[Span], str]:
    """Renders a conversation and finds what each assistant message became.

    Args:
        template: the chat template.
        conversation: messages, tools and template arguments.
        special: texts of the tokenizer's special tokens.

    Returns:
        The whole text, one character span an assistant message in order, and the route that found them.

    Raises:
        TemplateError: the template refuses the conversation.
        Undecided: no route is exact for it; the message has every route's reason.
    """
    text, generated = template.render(conversation.messages, conversation.tools, conversation.kwargs)
    reasons = []
    for name, route in (("generation", _generation), ("prefix", _prefix), ("boundaries", _boundaries)):
        try:
            spans = route(template, conversation, special, text, generated)
            _check_order(spans, text, conversation)
            return text, spans, name
        except Undecided as reason:
            reasons.append(f"{name}: {reason}")
    raise Undecided("; ".join(reasons))


def _check_order(spans: Sequence[Span], text: str, conversation: Conversation) -> None:
    if len(spans) != len(conversation.assistants()):
        raise Undecided(f"found {len(spans)} spans for {len(conversation.assistants())} assistant messages")
    place = 0
    for first, last in spans:
        if not place <= first <= last <= len(text):
            raise Undecided("the spans overlap")
        place = last


def _generation(template: Template, conversation: Conversation, special: Any, text: str, generated: list[Span]) -> list[Span]:
    if not template.has_generation:
        raise Undecided("the template has no {% generation %} blocks")
    return generated


def _prefix(template: Template, conversation: Conversation, special: Sequence[str], text: str, generated: Any) -> list[Span]:
    spans, messages = [], list(conversation.messages)
    for index in conversation.assistants():
        try:
            head, _ = template.render(messages[:index], conversation.tools, conversation.kwargs, add_generation_prompt=True)
            full, _ = template.render(messages[: index + 1], conversation.tools, conversation.kwargs)
        except TemplateError as error:
            raise Undecided(f"the template refuses the first {index} messages ({error})") from None
        full = _end_of_turn(full, special)
        if not (text.startswith(full) and full.startswith(head)):
            raise Undecided(f"message {index} is rendered otherwise when others follow it")
        if head == _without_prompt(template, conversation, index):
            raise Undecided("the template has no generation prompt to tell where an answer begins")
        spans.append((len(head), len(full)))
    return spans


def _without_prompt(template: Template, conversation: Conversation, index: int) -> str:
    try:
        return template.render(conversation.messages[:index], conversation.tools, conversation.kwargs)[0]
    except TemplateError as error:
        raise Undecided(f"the template refuses the first {index} messages ({error})") from None


def _end_of_turn(text: str, special: Sequence[str]) -> str:
    """Cuts white space behind a special token off: `...<|im_end|>\\n` -> `...<|im_end|>`."""
    bare = text.rstrip()
    return bare if bare.endswith(tuple(special)) else text


def _boundaries(template: Template, conversation: Conversation, special: Sequence[str], text: str, generated: Any) -> list[Span]:
    header, end = _header_and_end(template, conversation, special)
    count = len(conversation.assistants())
    for message in conversation.messages:
        if header in str(message.get("content")) or end in str(message.get("content")):
            raise Undecided("a message contains the template's own header or end-of-turn text")
    spans, place = [], 0
    for _ in range(text.count(header)):
        first = text.index(header, place) + len(header)
        last = text.find(end, first)
        if last < 0:
            raise Undecided("an assistant message has no end-of-turn token")
        spans.append((first, last + len(end)))
        place = last
    if len(spans) != count:
        raise Undecided(f"the text has {len(spans)} assistant headers for {count} assistant messages")
    for (first, last), index in zip(spans, conversation.assistants(), strict=True):
        said = str(conversation.messages[index].get("content") or "").split("</think>")[-1].strip()
        if said not in text[first:last]:
            raise Undecided(f"message {index} is not found whole between header and end-of-turn token")
    return spans


def _header_and_end(template: Template, conversation: Conversation, special: Sequence[str]) -> tuple[str, str]:
    """The assistant's header and the end-of-turn token, from a two-message conversation of words nobody writes."""
    question, answer = {"role": "user", "content": "qxjzq"}, {"role": "assistant", "content": "wxvkw"}
    try:
        asked, _ = template.render([question], None, conversation.kwargs)
        prompted, _ = template.render([question], None, conversation.kwargs, add_generation_prompt=True)
        whole, _ = template.render([question, answer], None, conversation.kwargs)
    except TemplateError as error:
        raise Undecided(f"the template refuses a short conversation ({error})") from None
    if not prompted.startswith(asked) or prompted == asked or whole.count("wxvkw") != 1:
        raise Undecided("the template has no generation prompt to tell where an answer begins")
    header = prompted[len(asked) :].split("<think>")[0]
    after = whole.split("wxvkw")[1].lstrip()
    ends = [token for token in special if token and after.startswith(token)]
    if not header.strip() or not ends:
        raise Undecided("the template has no header or no end-of-turn token")
    return header, max(ends, key=len)
