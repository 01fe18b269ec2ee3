"""Which characters of a rendered conversation the assistant wrote. Exact, or an error; never a guess.

Three routes, in this order; the first that can decide does:
1. generation: the template says it itself with {% generation %} blocks;
2. prefix: the conversation up to each assistant message, rendered with and without it, brackets the message, where
   both renders are prefixes of the whole text;
3. boundaries: the text between the assistant's header (what add_generation_prompt adds) and the end-of-turn token, for
   templates that render a message otherwise once others follow it (Qwen3 drops old <think> blocks). A second render
   with words nobody writes in place of every content tells the template's own text from what people wrote.
A span holds the message and its end-of-turn token, not the header before nor the newline after.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sft.data.templates import Span, Template, TemplateError

ROUTES = ("generation", "prefix", "boundaries")
ANSWERS = ("wxvkw", "vkwxw")
WRITTEN = "\x00"
"""What a message says is seen by the boundaries route as this character, which no template has."""


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
                if not template.has_generation:
                    raise Undecided("the template has no {% generation %} blocks")
                spans = generated
            else:
                turn = _turn(template, conversation.kwargs, tuple(special))
                route = _prefix if name == "prefix" else _boundaries
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
    """End-of-turn tokens: of the last answer, and of earlier ones where that differs (gpt-oss: <|return|>, <|end|>)."""
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
    found = template.learned[key]
    if isinstance(found, str):
        raise Undecided(found)
    return found


def _learn_turn(template: Template, kwargs: Mapping[str, Any], special: tuple[str, ...]) -> _Turn:
    question = {"role": "user", "content": "qxjzq"}
    answers = [{"role": "assistant", "content": word} for word in ANSWERS]
    one, _ = template.render([question, answers[0]], None, kwargs)
    two, _ = template.render([question, answers[0], question, answers[1]], None, kwargs)
    asked, _ = template.render([question], None, kwargs)
    prompted, _ = template.render([question], None, kwargs, add_generation_prompt=True)
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
    thought = before[len(asked + header) :]
    return _Turn(prompt, header, thought, tuple(dict.fromkeys(ends)), rest, special)


def _first_special(text: str, special: Sequence[str]) -> str:
    """The special token at the beginning of a text, white space aside; empty: none."""
    return max((token for token in special if token and text.lstrip().startswith(token)), key=len, default="")


def _prefix(template: Template, conversation: Conversation, turn: _Turn, text: str) -> list[Span]:
    if turn.header.strip() and (exact := _exact_answers(conversation, turn, text, turn.thought)):
        if all(text.startswith(turn.thought, first) for first, _ in exact):
            return exact
        raise Undecided("an answer is rendered otherwise when others follow it")
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
        if not full.startswith(head):
            raise Undecided(f"message {index} does not follow its generation prompt")
        if not head.endswith(turn.prompt) and turn.header.strip() in full[len(head) :]:
            raise Undecided(f"there is no generation prompt before message {index}")
        ends = turn.special if messages[index].get("tool_calls") else turn.ends  # some end a tool call otherwise: <|call|>
        if not full[len(head) :].endswith(ends):
            raise Undecided(f"no end-of-turn token ends message {index}")
        spans.append((len(head), len(full)))
    return spans


def _boundaries(template: Template, conversation: Conversation, turn: _Turn, text: str) -> list[Span]:
    if not turn.header.strip():
        raise Undecided("no header begins an answer")
    if exact := _exact_answers(conversation, turn, text, turn.thought):
        return exact
    for call in (message.get("tool_calls") for message in conversation.messages):
        said = json.dumps(call, ensure_ascii=False, default=str)
        if any(own in said for own in (turn.header.strip(), *turn.ends)):
            raise Undecided("a tool call contains the template's own header or end-of-turn token")
    own, places = _own_text(template, conversation, text)
    spans: list[Span] = []
    owners: list[int | None] = []
    place = own.find(turn.header)
    while place >= 0:
        first = place + len(turn.prompt if own.startswith(turn.prompt, place) else turn.header)
        found = [(own.find(end, first), end) for end in turn.ends if own.find(end, first) >= 0]
        if not found:
            raise Undecided("an assistant message has no end-of-turn token")
        last = min(found)[0] + len(min(found)[1])
        following = own.find(turn.header, first)
        if 0 <= following < last:
            raise Undecided("an assistant message begins before the one before it has ended")
        written = {index for at, index in places if first <= at < last}
        if len(written) > 1:
            raise Undecided("between header and end-of-turn token stands more than one message")
        owner = next(iter(written), None)
        if spans and owner is not None and owner == owners[-1]:  # gpt-oss: analysis and final are one turn
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
            owners.append(owner)
        place = following
    expected = conversation.assistants()
    if len(spans) != len(expected) or any(o not in (None, e) for o, e in zip(owners, expected, strict=True)):
        raise Undecided(f"the text has {len(spans)} assistant headers for {len(expected)} assistant messages")
    return spans


def _exact_answers(conversation: Conversation, turn: _Turn, text: str, thought: str = "") -> list[Span]:
    """The spans without another render, where every answer stands unchanged between its header and its end token.

    Only for conversations of plain text in which nobody writes a header's beginning; empty: the long way decides.
    thought: what the template itself may put before an answer; without it, the header must be the whole prompt.
    """
    opening = turn.header.strip()[:2]
    for message in conversation.messages:
        said = message.get("content")
        if not isinstance(said, str) or opening in said or "<think>" in said or len(message.keys() - {"role", "content"}):
            return []
    spans: list[Span] = []
    place = 0
    for index in conversation.assistants():
        place = text.find(turn.header, place)
        asked = text.startswith(turn.prompt, place)
        first = place + len(turn.prompt if asked else turn.header)
        begin = first + len(thought) if text.startswith(thought, first) else first
        said = conversation.messages[index]["content"]
        form = next((form for form in (said, said.strip(), said.lstrip("\n")) if text.startswith(form, begin)), None)
        if place < 0 or form is None or not said.strip() or not (asked or thought):
            return []
        after = begin + len(form)
        end = next((end for end in turn.ends if text.startswith(end, after)), None)
        if end is None:
            return []
        place = after + len(end)
        spans.append((first, place))
    return spans if text.find(turn.header, place) < 0 else []


def _own_text(template: Template, conversation: Conversation, text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text with WRITTEN in place of every character that a message brought, and (place, message index) of each."""
    words: dict[str, tuple[int, str]] = {}
    messages = [_with_words(message, index, words) for index, message in enumerate(conversation.messages)]
    marked, _ = template.render(messages, conversation.tools, conversation.kwargs)
    own: list[str] = []
    places: list[tuple[int, int]] = []
    place = 0
    for literal, index, said, following in _pieces(marked, words):
        if not text.startswith(literal, place) or WRITTEN in literal:
            raise Undecided("the template decides by what a message says")
        own.append(literal)
        place += len(literal)
        if index is None:
            continue
        forms = dict.fromkeys((said, said.strip(), said.lstrip("\n"), said.strip("\n"), said.lstrip(), said.rstrip(), ""))
        ends = (place + len(form) for form in forms if text.startswith(form + following, place))
        end = next((end for end in ends if following or end == len(text)), None)
        if end is None:
            raise Undecided(f"message {index} is not found whole in the text")
        own.append(WRITTEN * (end - place))
        places += [(place, index)] if end > place else []
        place = end
    if place != len(text):
        raise Undecided("the text has more than the messages bring")
    return "".join(own), places


def _with_words(message: Mapping[str, Any], index: int, words: dict[str, tuple[int, str]]) -> dict[str, Any]:
    """The message with a word in place of its content (of what follows </think>, where there is reasoning)."""
    changed = dict(message)
    for key in ("content", "reasoning_content", "thinking"):
        said = message.get(key)
        if not isinstance(said, str) or not said.strip():
            continue
        kept, mark, said = said.rpartition("</think>") if message["role"] == "assistant" else ("", "", said)
        if not said.strip():
            continue
        word = f"zq{index}{key[0]}qz"
        words[word] = (index, said)
        changed[key] = f"{kept}{mark}{word}"
    return changed


def _pieces(marked: str, words: Mapping[str, tuple[int, str]]) -> Iterator[tuple[str, int | None, str, str]]:
    """(template's text, message index, what it says, template's text after it) up to each word, then the rest."""
    places = sorted((marked.find(word), word) for word in words if word in marked)
    ends = [place for place, _ in places[1:]] + [len(marked)]
    start = 0
    for (place, word), end in zip(places, ends, strict=True):
        if marked.count(word) != 1:
            raise Undecided(f"message {words[word][0]} is rendered more than once")
        yield marked[start:place], *words[word], marked[place + len(word) : end]
        start = place + len(word)
    yield marked[start:], None, "", ""
