"""Chat templates: Jinja in a sandbox, compiled once, tried in a limited process before it is trusted with the data.

The environment is the one that transformers renders with (transformers/utils/chat_template_utils.py): a test compares
the texts. `{% generation %}` blocks leave marks in the text, from which the trained spans are read.
Not here: which part of a text is trained (spans.py), tokens (chat.py).
"""

import json
import multiprocessing
import resource
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

from megatron_sft.data.fork import forked
from megatron_sft.data.traced import OWN, authors_of, own_literals, signed, signed_message
from megatron_sft.errors import UserError

PROBE_S = 4.0
PROBE_BYTES = 2**30
RENDER_S = 3.5
"""Seconds that one row may take; a template can be harmless on the rows of the probe alone."""
RENDER_CHARACTERS = 2**27
MESSAGE_CHARACTERS = 1000
ONE_STEP_S = 1.0
"""Seconds of work more before an expendable process ends, which one long step of C code keeps from being told."""
TOO_LONG = f"runs for more than {RENDER_S:g} s"
LIMIT_MESSAGE = "did not finish in {seconds:g} s and {gib:g} GiB"

DICT_NAMES = frozenset(dir(dict))
SAFE_NAMES: Mapping[type, frozenset[str]] = {
    str: frozenset(("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "replace", "lower", "upper", "title")),
    jinja2.runtime.LoopContext: frozenset(("index", "index0", "first", "last", "length", "revindex", "revindex0")),
}
"""Attributes that neither change the object nor lead out of the sandbox."""

Span = tuple[int, int]


class TemplateError(Exception):
    """A template that cannot be compiled, refuses a conversation, runs away or tries to leave the sandbox.

    Args:
        message: what it does, to follow "the chat template".
        is_fatal: no conversation is to be blamed for it.
    """

    def __init__(self, message: str, is_fatal: bool = False):
        self.is_fatal = is_fatal
        super().__init__(message if len(message) <= MESSAGE_CHARACTERS else f"{message[:MESSAGE_CHARACTERS]}...")


class _Refusal(jinja2.TemplateError):
    """The template itself called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says, between two marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        marks: Any = self.environment.globals["generation_marks"]
        return str(marks[0] + caller() + marks[1])  # added up: a Traced text stays one


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses arithmetic whose result would fill the memory in one step, which no clock can interrupt."""

    intercepted_binops = frozenset(("*", "**"))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As jinja2's, without its checks where they cannot fail: half of the time that rendering took."""
        kind = type(obj)
        if kind is dict and attribute not in DICT_NAMES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if attribute in SAFE_NAMES.get(kind, ()):
            return getattr(obj, attribute)
        if kind is jinja2.utils.Namespace and not attribute.startswith("_"):
            return getattr(obj, attribute) if hasattr(obj, attribute) else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            size = max((len(a) * b for a, b in ((left, right), (right, left)) if _repeats(a, b)), default=0)
        else:
            size = abs(left).bit_length() * right if isinstance(left, int) and isinstance(right, int) else 0
        if size > RENDER_CHARACTERS:
            raise jinja2.exceptions.SecurityError(f"a value of {size:.0e} parts")
        return super().call_binop(context, operator, left, right)


def _repeats(value: Any, count: Any) -> bool:
    return isinstance(value, str | list | tuple | bytes) and isinstance(count, int)


class _Unfolded(jinja2.compiler.CodeGenerator):
    """Compiles constants without computing them: {{ 'a' * 10**10 }} must not run before the limits do."""

    def _output_child_to_const(self, node: Any, frame: Any, finalize: Any) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible()
        return super()._output_child_to_const(node, frame, finalize)


def _environment(marks: Sequence[str]) -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], optimized=False
    )
    environment.code_generator_class = _Unfolded
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "generation_marks": marks,
    }
    return environment


class Template:
    """A compiled chat template.

    Args:
        text: Jinja.
        special_tokens: names such as bos_token that templates use.

    Attributes:
        has_generation: the template says itself what the assistant writes.
        is_expendable: this process may be killed (SIGPROF) when a render cannot be ended otherwise.
        learned: what spans.py found out about the template, by template arguments.

    Raises:
        TemplateError: the text is no Jinja.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]):
        self.text = text
        self._special_tokens = dict(special_tokens)
        self._marks = tuple(f"\x02{name}{secrets.token_hex(8)}\x03" for name in ("from", "to"))
        try:
            self._compiled = _environment(self._marks).from_string(text)
        except (jinja2.TemplateError, RecursionError, MemoryError, OverflowError, ValueError) as error:
            raise TemplateError(f"cannot be compiled: {error or type(error).__name__}", is_fatal=True) from None
        self._traced: jinja2.Template | None = None
        self.is_expendable = False
        self.has_generation = "generation" in text and "endgeneration" in text
        self.learned: dict[Any, Any] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and the character spans of its generation blocks.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        return self._unmark(self._run(self._compiled, messages, tools, kwargs, add_generation_prompt))

    def trace(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, kwargs: Mapping[str, Any]
    ) -> tuple[str, str]:
        """The text of a conversation and the author of each of its characters (traced.py), in several times render's time.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        if self._traced is None:
            self._traced = own_literals(_environment(("", "")), self.text)
            self._own_tokens = {name: signed(text, OWN) for name, text in self._special_tokens.items()}
        said = [signed_message(message, index) for index, message in enumerate(messages)]
        text = self._run(self._traced, said, tools, {**self._own_tokens, **kwargs}, False)
        return text, authors_of(text)

    def _run(self, compiled: jinja2.Template, messages: Any, tools: Any, kwargs: Any, add_generation_prompt: bool) -> str:
        values = {
            **self._special_tokens,
            **(kwargs or {}),
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with limited_time(self.is_expendable):
                return compiled.render(**values)
        except jinja2.exceptions.SecurityError as error:
            raise TemplateError(f"tries to leave the sandbox: {error}", is_fatal=True) from None
        except _Refusal as error:
            raise TemplateError(f"refuses the conversation: {error}") from None
        except (RecursionError, MemoryError, OverflowError) as error:
            raise TemplateError(f"runs away: {type(error).__name__}", is_fatal=True) from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, NameError, ZeroDivisionError) as error:
            raise TemplateError(f"fails on the conversation: {error}") from None

    def _unmark(self, marked: str) -> tuple[str, list[Span]]:
        first, last = self._marks
        text, spans = "", []
        head, *parts = marked.split(first)
        text = head
        for part in parts:
            inside, _, after = part.partition(last)
            spans.append((len(text), len(text) + len(inside)))
            text += inside + after
        return text, spans


@contextmanager
def limited_time(is_expendable: bool) -> Iterator[None]:
    """Raises TemplateError after RENDER_S, or a little later ends an expendable process.

    Only the main thread has the clock, and tokenising runs there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGALRM) is not _too_long:  # stays: nothing else here uses the alarm
        signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, RENDER_S)
    if is_expendable:
        signal.setitimer(signal.ITIMER_PROF, RENDER_S + ONE_STEP_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if is_expendable:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _too_long(*_: Any) -> None:
    raise TemplateError(TOO_LONG, is_fatal=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refusal(message)


def probe(text: str, special_tokens: Mapping[str, str], conversations: Sequence[tuple[Any, Any, Any]]) -> None:
    """Compiles and renders in a process with limits on time and memory, so that a hostile template cannot hang a run.

    Args:
        text: the template.
        special_tokens: as Template's.
        conversations: (messages, tools, kwargs) of real rows.

    Raises:
        TemplateError: it was killed at a limit, cannot be compiled, left the sandbox, or failed on every conversation.
    """

    def failures() -> list[str]:
        template = Template(text, special_tokens)
        return [_failure(template, *conversation) for conversation in conversations]

    failed = limited(failures, PROBE_S)
    if failed and all(error.startswith("fails") for error in failed):
        raise TemplateError(failed[0])


def limited(work: Callable[[], Any], seconds: float | None) -> Any:
    """What `work` returns, done in a process of its own with PROBE_BYTES more memory.

    Args:
        work: may render templates that set is_expendable.
        seconds: for all of it; None: each render has its limits, and nothing else takes long.

    Raises:
        TemplateError: it was killed at a limit.
        UserError: what `work` raised.
    """
    connection, theirs = multiprocessing.Pipe(duplex=False)
    process = forked(_answer, theirs, work)
    theirs.close()
    try:
        if connection.poll(seconds):
            answer = connection.recv()
        else:
            answer = TemplateError(LIMIT_MESSAGE.format(seconds=seconds, gib=PROBE_BYTES / 2**30))
    except (EOFError, OSError):
        process.join()
        is_late = process.exitcode == -signal.SIGPROF
        answer = TemplateError(TOO_LONG if is_late else "ended its process: out of memory, most likely")
    finally:
        process.kill()
        process.join()
        connection.close()
    if isinstance(answer, TemplateError | UserError):
        raise answer
    return answer


def _answer(connection: Any, work: Callable[[], Any]) -> None:
    answer: Any
    try:
        with limited_memory(PROBE_BYTES):
            answer = work()
    except (TemplateError, UserError) as error:
        answer = error
    except MemoryError:
        answer = TemplateError(f"needs more than {PROBE_BYTES / 2**30:g} GiB")
    connection.send(answer)


def _failure(template: Template, messages: Any, tools: Any, kwargs: Any) -> str:
    """Why a conversation cannot be rendered, or nothing: such a row is that row's problem, found later."""
    try:
        template.render(messages, tools, kwargs)
    except TemplateError as error:
        if error.is_fatal:
            raise
        return str(error)
    return ""


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """Within it, this process (one made for such work) gets MemoryError when it allocates so much more than it has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
