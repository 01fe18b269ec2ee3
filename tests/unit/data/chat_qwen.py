"""What the templates of Qwen and Nemotron make of a conversation, with tools and reasoning, by hand (see chat_families.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.unit.data.chat_oracle import Chat, Messages, Pieces, answer, as_json, last_user, literal


def _tool_response(messages: Messages, index: int, opens: str = "<|im_start|>user", between: str = "\n") -> Pieces:
    """A tool's result in the manner of Qwen: results that follow one another share a turn of the user."""
    is_first = index == 0 or messages[index - 1]["role"] != "tool"
    is_last = index + 1 == len(messages) or messages[index + 1]["role"] != "tool"
    text = f"{between}<tool_response>\n{messages[index]['content']}\n</tool_response>"
    return [((opens if is_first else "") + text + ("<|im_end|>\n" if is_last else ""), False)]


QWEN_TOOLS = "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
QWEN_TOOLS += "signatures within <tools></tools> XML tags:\n<tools>"
QWEN_CALLS = "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call>"
QWEN_CALLS += '</tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def _qwen_call(call: Mapping[str, Any]) -> str:
    arguments = call["function"]["arguments"]
    shown = arguments if isinstance(arguments, str) else as_json(arguments)
    return f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": {shown}}}\n</tool_call>'


def _qwen_system(chat: Chat, default: str, gap: str) -> Pieces:
    first = chat.messages[0]
    system = first["content"] if first["role"] == "system" else default
    if chat.tools:
        listed = "".join("\n" + as_json(tool) for tool in chat.tools)
        said = system + gap if first["role"] == "system" or default else ""
        return [(f"<|im_start|>system\n{said}{QWEN_TOOLS}{listed}{QWEN_CALLS}<|im_end|>\n", False)]
    shown = first["role"] == "system" or default
    return [(f"<|im_start|>system\n{system}<|im_end|>\n" if shown else "", False)]


def qwen2_5(chat: Chat) -> Pieces:
    found = _qwen_system(chat, _QWEN, "\n\n")
    for index, message in enumerate(chat.messages):
        role, content = message["role"], message["content"]
        if role == "assistant":
            calls = [_qwen_call(call) for call in message.get("tool_calls", [])]
            body = "\n".join([content] * bool(content or not calls) + calls)
            found += answer("<|im_start|>assistant\n", "", body + "<|im_end|>", "\n")
        elif role == "tool":
            found += _tool_response(chat.messages, index)
        elif role == "user" or index:
            found.append((f"<|im_start|>{role}\n{content}<|im_end|>\n", False))
    return found


def _think(message: Mapping[str, Any], content: str) -> tuple[str, str]:
    """(reasoning, answer): of reasoning_content, or of <think> in the content."""
    if isinstance(message.get("reasoning_content"), str):
        return message["reasoning_content"], content
    if "</think>" not in content:
        return "", content
    before, after = content.split("</think>")[0], content.split("</think>")[-1]
    return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")


def _last_query(messages: Messages, trim: bool) -> int:
    """The last question: a user message that is no tool result in disguise."""
    for index in range(len(messages) - 1, -1, -1):
        said = messages[index]["content"].strip() if trim else messages[index]["content"]
        if messages[index]["role"] == "user" and not (said.startswith("<tool_response>") and said.endswith("</tool_response>")):
            return index
    return -1 if trim else len(messages) - 1


def qwen3(chat: Chat, thinks_always: bool = False) -> Pieces:
    found = _qwen_system(chat, "", "\n\n")
    query = _last_query(chat.messages, False)
    opened = "<think>\n\n</think>\n\n" if chat.kwargs.get("enable_thinking") is False else ""
    for index, message in enumerate(chat.messages):
        role, content = message["role"], message["content"]
        if role == "assistant":
            reasoning, content = _think(message, content)
            is_shown = index > query and (index + 1 == len(chat.messages) or bool(reasoning))
            body = content
            if is_shown or thinks_always:
                body = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
            for number, call in enumerate(message.get("tool_calls", [])):
                body += ("\n" if content or number else "") + _qwen_call(call)
            if thinks_always:  # TRL's {% generation %} block begins at the header and holds the line break too
                found += answer("<|im_start|>assistant\n", "", body + "<|im_end|>\n", "")
            else:
                found += answer("<|im_start|>assistant\n", opened, body + "<|im_end|>", "\n")
        elif role == "tool":
            found += _tool_response(chat.messages, index)
        elif role == "user" or index:
            found.append((f"<|im_start|>{role}\n{content}<|im_end|>\n", False))
    return found


def qwen3_training(chat: Chat) -> Pieces:
    return qwen3(chat, thinks_always=True)


def _xml_arguments(call: Mapping[str, Any]) -> str:
    found = ""
    for name, value in call["function"]["arguments"].items():
        found += f"<parameter={name}>\n{as_json(value) if isinstance(value, dict | list) else value}\n</parameter>\n"
    return f"<tool_call>\n<function={call['function']['name']}>\n{found}</function>\n</tool_call>"


def qwen3_5(chat: Chat) -> Pieces:
    messages = chat.messages
    query = _last_query(messages, True)
    is_system = messages[0]["role"] == "system"
    system = messages[0]["content"].strip() if is_system else ""
    found: Pieces = [(f"<|im_start|>system\n{system}<|im_end|>\n" if is_system else "", False)]
    if chat.tools:
        opening = literal("qwen3_5_think", '{{- "# Tools', '" }}')
        listed = "".join("\n" + as_json(tool) for tool in chat.tools) + "\n</tools>"
        how = literal("qwen3_5_think", "{{- '\\n\\nIf you choose", "' }}")
        said = "\n\n" + system if system else ""
        found = [(f"<|im_start|>system\n# Tools{opening}{listed}\n\nIf you choose{how}{said}<|im_end|>\n", False)]
    opened = "<think>\n\n</think>\n\n" if chat.kwargs.get("enable_thinking") is False else "<think>\n"
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "assistant":
            reasoning, content = _think(message, content)
            body = f"<think>\n{reasoning.strip()}\n</think>\n\n" * (index > query) + content
            for number, call in enumerate(message.get("tool_calls", [])):
                body += ("\n" if number else "\n\n" if content.strip() else "") + _xml_arguments(call)
            found += answer("<|im_start|>assistant\n", opened, body + "<|im_end|>", "\n")
        elif message["role"] == "tool":
            stripped = [{**m, "content": m["content"].strip()} for m in messages]
            found += _tool_response(stripped, index, opens="<|im_start|>user" * (index > 0))
        elif message["role"] == "user":
            found.append((f"<|im_start|>user\n{content}<|im_end|>\n", False))
    return found


def _nemotron_body(message: Mapping[str, Any], is_old: bool) -> str:
    content = message["content"]
    if (message.get("reasoning_content") or "").strip():
        content = f"<think>\n{message['reasoning_content']}\n</think>\n{content}"
    elif "<think>" not in content and "</think>" not in content:
        content = "<think></think>" + content
    calls = message.get("tool_calls")
    if not calls:
        if is_old and "<think>" in content and "</think>" in content:
            content = "<think></think>" + content.split("</think>")[-1]
        return content.strip()
    if not content.strip():
        said = "<think></think>"
    elif is_old:
        after = content.split("</think>")[-1] if "</think>" in content else content.split("<think>")[0]
        said = f"<think></think>{after.strip()}\n"
    else:
        said = content.strip() + "\n"
    return said + "".join(_xml_arguments(call) + "\n" for call in calls)


def _nemotron_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    found = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
    for tool in (tool["function"] for tool in tools):
        found += (
            f"\n<function>\n<name>{tool['name']}</name>\n<description>{tool['description'].strip()}</description>\n<parameters>"
        )
        for name, given in tool["parameters"]["properties"].items():
            found += f"\n<parameter>\n<name>{name}</name>\n<type>{given['type']}</type>\n"
            found += f"<description>{given['description'].strip()}</description>\n</parameter>"
        found += f"\n<required>{as_json(tool['parameters']['required'])}</required>\n</parameters>\n</function>"
    how = literal("nemotron_3_nano", "{{- '\\n\\nIf you choose", "' }}")
    return f"{found}\n</tools>\n\nIf you choose{how}"


def nemotron(chat: Chat) -> Pieces:
    rest = list(chat.messages)
    system = rest.pop(0)["content"] if rest[0]["role"] == "system" else ""
    tools = ("\n\n" if system else "") + _nemotron_tools(chat.tools) if chat.tools else ""
    found: Pieces = [(f"<|im_start|>system\n{system}{tools}<|im_end|>\n", False)]
    user, truncates = last_user(rest), chat.kwargs.get("truncate_history_thinking", True)
    opened = "<think>\n" if chat.kwargs.get("enable_thinking", True) else "<think></think>"
    for index, message in enumerate(rest):
        if message["role"] == "assistant":
            body = _nemotron_body(message, truncates and index < user) + "<|im_end|>"
            found += answer("<|im_start|>assistant\n", opened, body, "\n")
        elif message["role"] == "tool":
            is_first = index > 0 and rest[index - 1]["role"] != "tool"
            is_last = index + 1 == len(rest) or rest[index + 1]["role"] != "tool"
            text = f"<tool_response>\n{message['content']}\n</tool_response>\n"
            found.append((("<|im_start|>user\n" if is_first else "") + text + ("<|im_end|>\n" if is_last else ""), False))
        else:
            found.append((f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n", False))
    return found
