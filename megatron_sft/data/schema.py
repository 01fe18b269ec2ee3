"""One record of a data file -> Row: messages in OpenAI's form, tools, template arguments.

Not here: reading files (sources.py), rendering and masks (chat.py). A new format is one function and one line in SCHEMAS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sft.config.hints import nearest
from megatron_sft.config.run import DataConfig
from megatron_sft.data.limits import STRICT_JSON, TOO_DEEP, NotStrictError, is_deep
from megatron_sft.errors import DataError

Message = dict[str, Any]
"""role, content [, tool_calls, reasoning_content, name, tool_call_id, train: bool, weight: float]."""

ROLES = ("system", "user", "assistant", "tool", "developer")
ROLE_MAP = {
    "human": "user",
    "User": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "Assistant": "assistant",
    "System": "system",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
SYSTEM_KEYS = ("system", "system_prompt")
MESSAGE_KEYS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("problem", "solution"),
    ("input", "output"),
    ("input", "ideal"),
)
"""Columns taken for prompt and response when neither --prompt-key nor --response-key is given, first match wins."""
PROMPTS = ("prompt", "question", "query", "instruction", "problem", "input", "text")
"""Columns of a prompt, for generation; the first that is there."""
TEMPLATE_ARGUMENTS = frozenset(
    "self messages conversation conversations tools documents chat_template add_generation_prompt continue_final_message "
    "tokenize padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
"""What a row's chat_template_kwargs cannot say: the arguments of transformers' apply_chat_template and its renderer."""
SPELLINGS = {"content": ("value",), "train": ("training", "loss"), "weight": ("loss_weight", "loss_scale")}
"""Of a message's keys; the first one is ours."""
ALIASES = frozenset(("from", *(alias for aliases in SPELLINGS.values() for alias in aliases)))


class RowError(DataError):
    """A row that cannot be used.

    Args:
        where: `file:line`.
        reason: a few words, the same for all rows with this fault; the ledger counts by it.
        detail: what was found, what was expected, what to do.
    """

    def __init__(self, where: str, reason: str, detail: str):
        self.where, self.reason, self.detail = where, reason, detail
        super().__init__(f"{where}: {detail}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return RowError, (self.where, self.reason, self.detail)


@dataclass(frozen=True)
class Row:
    """A conversation, checked. `text` is set for plain-text rows, which have no messages."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    text: str | None = None
    schema: str = ""
    """Its name in SCHEMAS, or "text"; the ledger counts by it."""


def to_row(record: Mapping[str, Any] | RowError, where: str, config: DataConfig) -> Row:
    """Turns a record of any known schema into a Row.

    Args:
        record: one row as read; a RowError (a line that could not be read) is raised as it is.
        where: `file:line`, for messages.

    Raises:
        RowError: the record has no known schema, or breaks its rules.
    """
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, Mapping):
        raise RowError(
            where,
            "not an object",
            f'the row is {_kind(record)}; expected a JSON object such as {{"messages": [...]}}. Remove or rewrite the row.',
        )
    name = schema_of(record, config)
    if name is None:
        wanted = (
            f"those of --data-schema {config.data_schema}"
            if config.data_schema
            else ("messages, conversations, instruction/output, prompt/response or text")
        )
        raise RowError(
            where,
            "unknown schema",
            f"no known schema has the columns {_shorten(sorted(map(str, record)))}; "
            f"expected {wanted}. {_suggestion(record, config)}",
        )
    if name == "text":
        return Row([], where=where, text=_text(record["text"], where, "column text"), schema=name)
    messages = SCHEMAS[name](record, where, config)
    if not any(m["role"] == "assistant" for m in messages) and config.train_on != "all":
        raise RowError(
            where,
            "no assistant turn",
            "the conversation has no assistant message; expected at least one, "
            "as only these are trained. Remove the row, or pass --train-on all.",
        )
    return Row(messages, _tools(record, where, config), _template_kwargs(record, where), where, schema=name)


def prompt_of(record: Mapping[str, Any] | RowError, where: str, config: DataConfig) -> Row:
    """What a record asks: the messages of a training row before its last answer; the answer may be missing.

    Columns are those of training; where there is a prompt alone it is in the first of PROMPTS, or in --prompt-key.

    Raises:
        RowError: as to_row, or nothing is asked.
    """
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, Mapping):
        raise RowError(where, "not an object", f'the row is {_kind(record)}; expected an object such as {{"prompt": ...}}.')
    name = schema_of(record, config)
    key = config.prompt_key or next((key for key in PROMPTS if record.get(key) is not None), None)
    if name == "messages":
        messages = _messages(record, where, config)
    elif name == "alpaca" or (key == "instruction" and not config.prompt_key):
        messages = _alpaca({**record, "output": ""}, where, config)
    elif key is not None and not config.input_key:
        prompt = _column(record, key, config.prompt_dict_keys, where)
        messages = _with_system(record, _as_messages(prompt, "user", key, where, config), where)
    else:
        raise RowError(
            where,
            "no prompt",
            f"no prompt among the columns {_shorten(sorted(map(str, record)))}; expected messages, conversations, "
            f"{', '.join(PROMPTS)}. Name the column with --input-key or --prompt-key.",
        )
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RowError(
            where, "no prompt", "no message before the assistant's; expected a user message. Remove or rewrite the row."
        )
    return Row(messages, _tools(record, where, config), _template_kwargs(record, where), where)


def schema_of(record: Mapping[str, Any], config: DataConfig) -> str | None:
    """The name in SCHEMAS that the columns of a record ask for (or "text"); None: unknown, or not --data-schema."""
    if config.prompt_key or config.response_key:
        return "pair"
    if config.input_key:
        return "messages" if config.input_key in record else None
    fits = {
        "messages": any(record.get(key) is not None for key in MESSAGE_KEYS),
        "alpaca": record.get("instruction") is not None and ("output" in record or "response" in record),
        "pair": any(a in record and b in record for a, b in PAIRS),
        "text": "text" in record,
    }
    if config.data_schema:
        return config.data_schema if fits[config.data_schema] else None
    return next((name for name, is_fit in fits.items() if is_fit), None)


def _suggestion(record: Mapping[str, Any], config: DataConfig) -> str:
    """What to do about a record of no known schema."""
    if config.input_key and (near := nearest(config.input_key, [str(key) for key in record])):
        return f"There is no column {config.input_key!r}: did you mean --input-key {near}?"
    return "Name the columns with --input-key, or with --prompt-key and --response-key."


def _messages(record: Mapping[str, Any], where: str, config: DataConfig) -> list[Message]:
    """OpenAI messages (role/content) and ShareGPT conversations (from/value), with an optional `system` column."""
    keys = (config.input_key,) if config.input_key else MESSAGE_KEYS
    key = next(k for k in keys if record.get(k) is not None or config.input_key)
    messages = _maybe_json(record[key], where)
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else _kind(messages)
        raise RowError(
            where,
            "no messages",
            f"column {key} is {what}; expected a list of messages "
            '[{"role": ..., "content": ...}, ...]. Remove or rewrite the row.',
        )
    return _with_system(record, [_message(m, i, where, config) for i, m in enumerate(messages)], where)


def _alpaca(record: Mapping[str, Any], where: str, config: DataConfig) -> list[Message]:
    """instruction, input (may be empty), output, with optional `system` and `history` (list of [prompt, response]).

    Dolly calls the last two of these three context and response.
    """
    prompt = _text(record["instruction"], where, "column instruction")
    answer = "output" if "output" in record else "response"
    for key in ("input", "context"):
        if record.get(key):
            prompt += "\n" + _text(record[key], where, f"column {key}")
    turns = _maybe_json(record.get("history"), where) or []
    if not isinstance(turns, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in turns):
        raise RowError(
            where, "bad history", f"column history is {_shorten(turns)}; expected a list of [prompt, response]. Correct the row."
        )
    history = [part for turn in turns for part in turn]
    texts = [_text(part, where, "column history") for part in history]
    texts += [prompt, _text(record[answer], where, f"column {answer}")]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return _with_system(record, messages, where)


def _pair(record: Mapping[str, Any], where: str, config: DataConfig) -> list[Message]:
    """A prompt and a response column; each may be text, a list of messages, or a dict (--prompt-dict-keys)."""
    keys = next(((a, b) for a, b in PAIRS if a in record and b in record), ("prompt", "response"))
    prompt_key, response_key = config.prompt_key or keys[0], config.response_key or keys[1]
    prompt = _column(record, prompt_key, config.prompt_dict_keys, where)
    response = _column(record, response_key, config.response_dict_keys, where)
    messages = _as_messages(prompt, "user", prompt_key, where, config)
    messages += _as_messages(response, "assistant", response_key, where, config)
    return _with_system(record, messages, where)


SCHEMAS: dict[str, Callable[[Mapping[str, Any], str, DataConfig], list[Message]]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "pair": _pair,
}


def _with_system(record: Mapping[str, Any], messages: list[Message], where: str) -> list[Message]:
    """The messages behind the text of column system or system_prompt, unless they begin with the same text themselves."""
    columns = {f"column {key}": _text(record[key], where, f"column {key}") for key in SYSTEM_KEYS if record.get(key)}
    first = {"message 1": messages[0]["content"]} if messages and messages[0]["role"] == "system" else {}
    system = _only_one(first | columns, where)
    return messages if first or not columns else [{"role": "system", "content": system}, *messages]


def _only_one(given: Mapping[str, Any], where: str) -> Any:
    """The first of values that stand in several places for the same thing and so must be equal; None: there is none.

    Args:
        given: place -> value; values that are None do not count.
    """
    values = {place: value for place, value in given.items() if value is not None}
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        raise RowError(
            where,
            "said twice",
            f"{' and '.join(values)} differ ({_shorten(list(values.values()))}); expected one value. Remove the others.",
        )
    return first


def _column(record: Mapping[str, Any], key: str, dict_keys: tuple[str, ...], where: str) -> Any:
    """record[key][dict_keys[0]][dict_keys[1]]...; a list met on the way stands for its first element, JSON text for its value."""
    value: Any = record
    for step in (key, *dict_keys):
        value = _maybe_json(value, where)
        if isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, Mapping) or step not in value:
            have = sorted(map(str, value)) if isinstance(value, Mapping) else _kind(value)
            raise RowError(
                where,
                "missing column",
                f"column {step!r} is missing; found {_shorten(have)}. Correct --prompt-key, --response-key or their -dict-keys.",
            )
        value = value[step]
    return value


def _as_messages(value: Any, role: str, key: str, where: str, config: DataConfig) -> list[Message]:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [_message(m, i, where, config) for i, m in enumerate(value)]
    return [{"role": role, "content": _text(value, where, f"column {key}")}]


def _message(raw: Any, index: int, where: str, config: DataConfig) -> Message:
    """One message in OpenAI's form; None values are left out, as apply_chat_template does."""
    here = f"message {index + 1}"
    if not isinstance(raw, Mapping):
        raise RowError(
            where,
            "message is no object",
            f"{here} is {_kind(raw)}; expected an object with role and content. Remove or rewrite the row.",
        )
    message: Message = {str(k): v for k, v in raw.items() if v is not None and k not in ALIASES}
    for name, names in SPELLINGS.items():
        if any(other in raw for other in names):
            value = _only_one({f"{key} of {here}": raw.get(key) for key in (name, *names)}, where)
            message |= {} if value is None else {name: value}
    given = raw.get("role", raw.get("from"))
    message["role"] = role = _role(given, here, where, config)
    if given in ("function_call", "tool_call"):
        message["content"], message["tool_calls"] = "", _maybe_json(message.get("content"), where)
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], here, where)
    if message.get("content") is None and role == "assistant" and message.get("tool_calls"):
        message["content"] = ""
    message["content"] = _text(message.get("content"), where, here)
    if "reasoning_content" in message:
        message["reasoning_content"] = _text(message["reasoning_content"], where, f"reasoning_content of {here}")
    _check_weight(message, here, where)
    return message


def _role(given: Any, here: str, where: str, config: DataConfig) -> str:
    role = config.role_map.get(given, ROLE_MAP.get(given, given)) if isinstance(given, str) else None
    if role in ROLES:
        return role
    what = f"role {given!r}" if given is not None else "no role"
    raise RowError(
        where,
        "unknown role",
        f"{here} has {what}; expected system, user, assistant or tool. "
        f"Rename it or pass --role-map {given if isinstance(given, str) else 'NAME'}=assistant.",
    )


def _check_weight(message: Message, here: str, where: str) -> None:
    train, weight = message.get("train"), message.get("weight")
    if train in (0, 1) and train is not None:
        message["train"] = train = bool(train)
    if train is not None and not isinstance(train, bool):
        raise RowError(where, "bad train flag", f"{here} has train {train!r}; expected true or false. Correct the row.")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and (weight == 0 or 1e-6 <= weight <= 1e6)):
        raise RowError(
            where,
            "bad weight",
            f"{here} has weight {_shorten(weight)}; expected 0 or a number from 1e-6 to 1e6. Correct the row.",
        )


def _tool_calls(value: Any, here: str, where: str) -> list[dict[str, Any]]:
    """[{"type": "function", "function": {"name", "arguments": dict}}]; arguments in a JSON string are parsed."""
    calls = [value] if isinstance(value, Mapping) else _maybe_json(value, where)
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(
                where,
                "bad tool call",
                f"{here} has a tool call without a function name: {_shorten(call)}; "
                'expected {"function": {"name": ..., "arguments": {...}}}. Correct the row.',
            )
        arguments = _maybe_json(function.get("arguments", {}), where)
        function = {**function, "arguments": arguments}
        result.append({**call, "function": function} if "function" in call else {"type": "function", "function": function})
    return result


def _tools(record: Mapping[str, Any], where: str, config: DataConfig) -> list[dict[str, Any]] | None:
    tools = _maybe_json(record.get(config.tool_key), where)
    if tools in (None, "", []):
        return None
    tools = [_maybe_json(tool, where) for tool in tools] if isinstance(tools, list) else [tools]
    bad = [tool for tool in tools if not isinstance(tool, Mapping)]
    if bad:
        raise RowError(
            where,
            "bad tools",
            f"column {config.tool_key} holds {_shorten(bad[0])}; expected a list of "
            "function schemas. Correct the row, or name the column with --tool-key.",
        )
    return [dict(tool) for tool in tools]


def _template_kwargs(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    kwargs = _maybe_json(record.get("chat_template_kwargs"), where) or {}
    if not isinstance(kwargs, Mapping):
        raise RowError(
            where,
            "bad chat_template_kwargs",
            f'chat_template_kwargs is {_kind(kwargs)}; expected an object such as {{"enable_thinking": false}}. Correct the row.',
        )
    if taken := sorted(TEMPLATE_ARGUMENTS & kwargs.keys()):
        raise RowError(
            where,
            "bad chat_template_kwargs",
            f"chat_template_kwargs sets {', '.join(taken)}; expected names that "
            "the template itself knows, such as enable_thinking. Correct the row.",
        )
    return dict(kwargs)


def _maybe_json(value: Any, where: str) -> Any:
    """Parses text that is a JSON object or list; anything else comes back as it is.

    Raises:
        RowError: it is JSON, but of a kind that no line of a file may be either (limits.py).
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        parsed = STRICT_JSON.decode(value)
    except NotStrictError as error:
        raise RowError(
            where, "bad JSON", f"JSON inside text: {error}; expected each key once, and finite numbers. Correct the row."
        ) from None
    except RecursionError:
        raise RowError(where, "nested too deep", TOO_DEEP) from None
    except ValueError:
        return value
    if is_deep(parsed):
        raise RowError(where, "nested too deep", TOO_DEEP)
    return parsed


def _text(value: Any, where: str, here: str) -> str:
    """Text that UTF-8 can hold. A list of {"type": "text"} parts is joined."""
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise RowError(
            where, "content is no text", f"{here} has content that is {_kind(value)}; expected text. Remove or rewrite the row."
        )
    return valid_text(value, where, here)


def valid_text(text: str, where: str, here: str = "the text") -> str:
    """The text, which UTF-8 can hold; else RowError."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                where,
                "lone surrogate",
                f"{here} has a lone surrogate at character {error.start}; expected "
                "valid Unicode. Correct the escape \\ud800-\\udfff in the row.",
            ) from None
    return text


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
