"""Which characters of a rendered conversation the assistant wrote. Exact, or an error; never a guess.

Four routes, in this order; the first that can decide does. U and A stand for what user and assistant say:
1. generation: the template says it itself with {% generation %} blocks, and no other message's text is in one.
   `<u>U<a>{% generation %}A<e>{% endgeneration %}` -> "A<e>"
2. plain: nobody writes anything like a header, so that each header that is found is the template's, and each answer
   stands word for word between one and its end-of-turn token. "<u>U<e><a>A<e>" -> "A<e>" after the only "<a>"
3. traced: a second render says who wrote each character (traced.py). An answer goes from a header to the first end-of-turn
   token that are both the template's own. "<u>U<e><a><think>Q<e></think>A<e>", where Q<e> is the assistant's -> all after <a>
4. prefix: for templates without a header. The conversation up to an answer, rendered with and without it, brackets the
   answer, where both are prefixes of the text. "[I]U[/I]" and "[I]U[/I]A</s>" -> "A</s>"

A span holds the message and its end-of-turn token, not the header before nor the newline after. The header is what
add_generation_prompt adds: a <think> that the prompt opens is not the assistant's.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sft.data.templates import Span, Template, TemplateError
from megatron_sft.data.traced import NOBODY, OWN, author

ROUTES = ("generation", "plain", "traced", "prefix")
QUESTION = {"role": "user", "content": "qxjzq"}
ANSWERS = ("wxvkw", "vkwxw")
CALL = {"type": "function", "function": {"name": "zqfnz", "arguments": {"zqkz": "zqvz"}}}
"""What nobody says, to learn what a template writes around it."""


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
    for name in ROUTES:
        try:
            if name == "generation":
                spans = _generation(template, conversation, text, generated)
            else:
                turn = _turn(template, conversation.kwargs, tuple(special))
                route = {"plain": _plain, "traced": _traced, "prefix": _prefix}[name]
                spans = route(template, conversation, turn, text)
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


@dataclass(frozen=True)
class _Turn:
    """What stands around an answer."""

    prompt: str
    """What add_generation_prompt adds: `<|im_start|>assistant\\n`, perhaps with an empty <think> block."""
    header: str
    """The prompt without <think>."""
    thought: str
    """An empty <think> block that the template itself puts before the last answer, or nothing."""
    ends: tuple[str, ...]
    """End-of-turn tokens: of the last answer, of earlier ones and of tool calls (gpt-oss: <|return|>, <|end|>, <|call|>)."""
    trailer: str
    """What follows the end token of the last answer: `\\n`, or nothing."""
    special: tuple[str, ...]
    """Texts of all special tokens."""


def _turn(template: Template, kwargs: Mapping[str, Any], special: tuple[str, ...]) -> _Turn:
    """Learns an answer's surroundings from conversations of words nobody writes; once for each set of arguments."""
    key = (json.dumps(kwargs, sort_keys=True, default=str) if kwargs else "", special)
    if key not in template.learned:
        try:
            template.learned[key] = _learn_turn(template, kwargs, special)
        except (Undecided, TemplateError) as error:
            if isinstance(error, TemplateError) and error.is_fatal:
                raise
            template.learned[key] = f"of a short conversation: {error}"
    learned = template.learned[key]
    if isinstance(learned, str):
        raise Undecided(learned)
    return learned


def _learn_turn(template: Template, kwargs: Mapping[str, Any], special: tuple[str, ...]) -> _Turn:
    answers = [{"role": "assistant", "content": word} for word in ANSWERS]
    one, _ = template.render([QUESTION, answers[0]], None, kwargs)
    two, _ = template.render([QUESTION, answers[0], QUESTION, answers[1]], None, kwargs)
    asked, _ = template.render([QUESTION], None, kwargs)
    prompted, _ = template.render([QUESTION], None, kwargs, add_generation_prompt=True)
    if one.count(ANSWERS[0]) != 1 or two.count(ANSWERS[0]) != 1:
        raise Undecided("the answer is not rendered once")
    before, after = one.split(ANSWERS[0])
    while not prompted.startswith(asked):  # phi3 ends a conversation with eos_token, unless a prompt is asked for
        tail = next((token for token in special if token and asked.endswith(token)), None)
        if tail is None:
            raise Undecided("the generation prompt does not follow the question")
        asked = asked[: -len(tail)]
    prompt = prompted[len(asked) :]
    header = prompt.split("<think>")[0].split("</think>")[0]
    # Mistral's [INST] question [/INST] is followed by the answer itself: no header, and none is needed.
    if not before.startswith(asked + header) or (not header.strip() and before[len(asked) :].strip()):
        raise Undecided("the template has no generation prompt to tell where an answer begins")
    end = _first_special(after, special)
    rest = after[after.index(end) + len(end) :]
    while end and (more := _first_special(rest, special)) and rest.startswith(more):  # Cohere: <|END_RESPONSE|><|END_OF_TURN|>
        end, rest = end + more, rest[len(more) :]
    earlier = two.split(ANSWERS[0])[1].lstrip()
    ends = [end, end if earlier.startswith(end) else _first_special(earlier, special)]
    if not all(ends):
        raise Undecided("no special token ends an answer, so that the model would never stop")
    ends += _call_ends(template, kwargs, rest, special)
    thought = before[len(asked + header) :]
    return _Turn(prompt, header, thought, tuple(dict.fromkeys(ends)), rest, special)


def _call_ends(template: Template, kwargs: Mapping[str, Any], trailer: str, special: Sequence[str]) -> list[str]:
    """The token that ends a turn with tool calls, however many: `</tool_call><|im_end|>` -> <|im_end|>."""
    texts = []
    for count in (1, 2):
        try:
            called = {"role": "assistant", "content": "", "tool_calls": [CALL] * count}
            texts.append(template.render([QUESTION, called], None, kwargs)[0].removesuffix(trailer))
        except TemplateError as error:  # some take one call alone, some none
            if error.is_fatal:
                raise
    end = max((token for token in special if token and texts and texts[0].endswith(token)), key=len, default="")
    return [end] if end and len({text.count(end) for text in texts}) == 1 else []


def _first_special(text: str, special: Sequence[str]) -> str:
    """The special token at the beginning of a text, white space aside; empty: none."""
    return max((token for token in special if token and text.lstrip().startswith(token)), key=len, default="")


def _generation(template: Template, conversation: Conversation, text: str, generated: list[Span]) -> list[Span]:
    if not template.has_generation:
        raise Undecided("the template has no {% generation %} blocks")
    _check_order(generated, text, conversation)
    if not _are_blocks_apart(template, conversation.kwargs):
        raise Undecided("a {% generation %} block holds what the user says")
    _check_authors(conversation, generated, authors_of_text(template, conversation, text))
    return generated


def _are_blocks_apart(template: Template, kwargs: Mapping[str, Any]) -> bool:
    """In a conversation of words nobody says no block holds a question; where one does, no row is trusted to be otherwise."""
    key = ("generation", json.dumps(kwargs, sort_keys=True, default=str))
    if key not in template.learned:
        said = [QUESTION, {"role": "assistant", "content": ANSWERS[0]}, QUESTION, {"role": "assistant", "content": ANSWERS[1]}]
        try:
            text, spans = template.render(said, None, kwargs)
            template.learned[key] = not any(QUESTION["content"] in text[first:last] for first, last in spans)
        except TemplateError as error:
            if error.is_fatal:
                raise
            template.learned[key] = True  # it refuses such a conversation; the authors tell
    return bool(template.learned[key])


def _plain(template: Template, conversation: Conversation, turn: _Turn, text: str) -> list[Span]:
    """Only for conversations of plain text in which nobody writes a header's beginning, not even half of it."""
    opening = turn.header.strip()[:2]
    if not opening:
        raise Undecided("no header begins an answer")
    if conversation.tools or any(opening in str(value) for value in conversation.kwargs.values()):
        raise Undecided("there are tools")
    for message in conversation.messages:
        said = message.get("content")
        if not isinstance(said, str) or len(message.keys() - {"role", "content"}) or "<think>" in said:
            raise Undecided("a message is more than plain text")
        if opening in said or said.rstrip().endswith(opening[0]):
            raise Undecided("somebody writes what begins a header")
    spans: list[Span] = []
    place = 0
    for index in conversation.assistants():
        place = text.find(turn.header, place)
        first = place + len(turn.prompt if text.startswith(turn.prompt, place) else turn.header)
        begin = first + len(turn.thought) if text.startswith(turn.thought, first) else first
        said = conversation.messages[index]["content"]
        form = next((form for form in (said, said.strip(), said.lstrip("\n")) if text.startswith(form, begin)), None)
        end = next((end for end in turn.ends if form is not None and text.startswith(end, begin + len(form))), None)
        if place < 0 or form is None or end is None or not form.strip():
            raise Undecided(f"message {index} does not stand word for word between a header and an end-of-turn token")
        place = begin + len(form) + len(end)
        spans.append((first, place))
    if text.find(turn.header, place) >= 0:
        raise Undecided("the text has more headers than answers")
    return spans


def _traced(template: Template, conversation: Conversation, turn: _Turn, text: str) -> list[Span]:
    if not turn.header.strip():
        raise Undecided("no header begins an answer")
    authors = authors_of_text(template, conversation, text)
    spans: list[Span] = []
    for first, last in _turns(text, authors, turn):
        before = _writers(authors, spans[-1]) if spans else set()
        if before and before == _writers(authors, (first, last)):  # gpt-oss: analysis and final are one turn
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    if len(spans) != len(conversation.assistants()):
        raise Undecided(f"the text has {len(spans)} assistant headers for {len(conversation.assistants())} assistant messages")
    _check_authors(conversation, spans, authors)
    return spans


def _turns(text: str, authors: str, turn: _Turn) -> Iterator[Span]:
    """From behind each header of the template's own to behind the first end-of-turn token of its own."""
    place = _find_own(text, authors, turn.header, 0)
    while place >= 0:
        first = place + len(turn.prompt if text.startswith(turn.prompt, place) else turn.header)
        ends = [(_find_own(text, authors, end, first), end) for end in turn.ends]
        nearest = min(((at, end) for at, end in ends if at >= 0), default=None)
        if nearest is None:
            raise Undecided("an assistant message has no end-of-turn token")
        last = nearest[0] + len(nearest[1])
        place = _find_own(text, authors, turn.header, first)
        if 0 <= place < last:
            raise Undecided("an assistant message begins before the one before it has ended")
        yield first, last


def _find_own(text: str, authors: str, wanted: str, start: int) -> int:
    """Where the template itself writes a text whole, from a place on; -1: nowhere."""
    place = text.find(wanted, start)
    while place >= 0 and authors[place : place + len(wanted)].strip(OWN):
        place = text.find(wanted, place + 1)
    return place


def authors_of_text(template: Template, conversation: Conversation, text: str) -> str:
    """One character a character of a rendered text (traced.py). Raises Undecided, TemplateError."""
    traced, authors = template.trace(conversation.messages, conversation.tools, conversation.kwargs)
    if traced != text:
        raise Undecided("the template renders the same conversation in two ways")
    return authors


def _writers(authors: str, span: Span) -> set[str]:
    return set(authors[span[0] : span[1]]) - {OWN, NOBODY}


def _check_authors(conversation: Conversation, spans: Sequence[Span], authors: str) -> None:
    """Each span holds its own message's text, if any of that is rendered, and no other message's."""
    for span, index in zip(spans, conversation.assistants(), strict=True):
        own = author(index)
        writers = _writers(authors, span)
        if writers - {own}:
            raise Undecided(f"in the turn of message {index} stands what another message says")
        if not writers and own in authors:
            raise Undecided(f"what message {index} says stands outside its turn")


def _prefix(template: Template, conversation: Conversation, turn: _Turn, text: str) -> list[Span]:
    spans, messages = [], list(conversation.messages)
    for index in conversation.assistants():
        try:
            is_last = index + 1 == len(messages)
            full = text if is_last else template.render(messages[: index + 1], conversation.tools, conversation.kwargs)[0]
            full = full.removesuffix(turn.trailer)
            if not text.startswith(full):
                raise Undecided(f"message {index} is rendered otherwise when others follow it")
            head, _ = template.render(messages[:index], conversation.tools, conversation.kwargs, add_generation_prompt=True)
        except TemplateError as error:
            if error.is_fatal:
                raise
            raise Undecided(f"the template refuses the first {index} messages ({error})") from None
        if not full.startswith(head):  # DeepSeek's prompt opens a <think> that no answer has in the text
            head = head.removesuffix(turn.prompt) + turn.header if head.endswith(turn.prompt) else head
        if not full.startswith(head):
            raise Undecided(f"message {index} does not follow its generation prompt")
        if not head.endswith((turn.prompt, turn.header)) and turn.header.strip() in full[len(head) :]:
            raise Undecided(f"there is no generation prompt before message {index}")
        if not full[len(head) :].endswith(turn.ends):
            raise Undecided(f"no end-of-turn token ends message {index}")
        spans.append((len(head), len(full)))
    return spans
