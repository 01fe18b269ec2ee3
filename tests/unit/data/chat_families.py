"""What real chat templates make of a conversation, written by hand from the templates: the oracle of the mask tests.

`Family.pieces(conversation)` gives (text, is trained) in order. Nothing here renders Jinja or reads spans.py. Trained is
what the model itself writes: all that follows what it is prompted with (the header of its turn, and the <think> that some
templates open for it), up to and with the end-of-turn token, and not the line break after it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.unit.data.chat_oracle import Chat, Pieces, answer, as_json, template_text
from tests.unit.data.chat_qwen import nemotron, qwen2_5, qwen3, qwen3_5, qwen3_training


@dataclass(frozen=True)
class Family:
    """One template and its oracle.

    Attributes:
        knows: what else than plain messages it renders: system, tools (schemas, calls, results), reasoning_content, thinking.
    """

    template: str
    pieces: Callable[[Chat], Pieces]
    special: tuple[str, ...]
    bos: str = ""
    eos: str = ""
    knows: tuple[str, ...] = ("system",)

    @property
    def text(self) -> str:
        return template_text(self.template)

    @property
    def has_system(self) -> bool:
        return "system" in self.knows


def _chatml(default_system: str = "", bos: str = "", tool: tuple[str, str] = ("", "")) -> Callable[[Chat], Pieces]:
    def pieces(chat: Chat) -> Pieces:
        found: Pieces = [(bos, False)]
        if chat.messages[0]["role"] != "system" and default_system:
            found.append((f"<|im_start|>system\n{default_system}<|im_end|>\n", False))
        for message in chat.messages:
            role, content = message["role"], message["content"]
            body = (tool[0] + content + tool[1] if role == "tool" else content) + "<|im_end|>"
            header = f"<|im_start|>{role}\n"
            found += answer(header, "", body, "\n") if role == "assistant" else [(header + body + "\n", False)]
        return found

    return pieces


def _lfm2(chat: Chat) -> Pieces:
    """Tools stand in the system message; a system message is written when it says something."""
    rest = list(chat.messages)
    system = rest.pop(0)["content"] if rest[0]["role"] == "system" else ""
    if chat.tools:
        listed = ", ".join(as_json(tool) for tool in chat.tools)
        system += ("\n" if system else "") + f"List of tools: <|tool_list_start|>[{listed}]<|tool_list_end|>"
    pieces = _chatml(tool=("<|tool_response_start|>", "<|tool_response_end|>"))(Chat(rest)) if rest else []
    return [("<|startoftext|>" + (f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""), False), *pieces]


def _llama_turn(role: str, body: str) -> Pieces:
    header = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    return answer(header, "", body + "<|eot_id|>", "") if role == "assistant" else [(header + body + "<|eot_id|>", False)]


def _llama3(chat: Chat) -> Pieces:
    found: Pieces = [("<|begin_of_text|>", False)]
    for message in chat.messages:
        found += _llama_turn(message["role"], message["content"].strip())
    return found


def _llama3_1(chat: Chat) -> Pieces:
    rest = list(chat.messages)
    system = rest.pop(0)["content"].strip() if rest[0]["role"] == "system" else ""
    dated = (
        "Environment: ipython\n" if chat.tools else ""
    ) + "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    found: Pieces = [("<|begin_of_text|>", False), *_llama_turn("system", dated + system)]
    if chat.tools:
        how = "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
        how += 'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
        how += "name and its value}.Do not use variables.\n\n"
        listed = "".join(as_json(tool, 4) + "\n\n" for tool in chat.tools)
        found += _llama_turn("user", how + listed + rest.pop(0)["content"].strip())
    for message in rest:
        if calls := message.get("tool_calls"):
            function = calls[0]["function"]
            body = f'{{"name": "{function["name"]}", "parameters": {as_json(function["arguments"])}}}'
            found += _llama_turn("assistant", body)
        elif message["role"] == "tool":
            found += _llama_turn("ipython", as_json(message["content"]))
        else:
            found += _llama_turn(message["role"], message["content"].strip())
    return found


def _gemma(chat: Chat) -> Pieces:
    found: Pieces = [("<bos>", False)]
    rest = list(chat.messages)
    system = rest.pop(0)["content"] + "\n\n" if rest[0]["role"] == "system" else ""
    for index, message in enumerate(rest):
        role, body = message["role"], message["content"].strip() + "<end_of_turn>"
        header = f"<start_of_turn>{'model' if role == 'assistant' else role}\n{'' if index else system}"
        found += answer(header, "", body, "\n") if role == "assistant" else [(header + body + "\n", False)]
    return found


def _phi3(chat: Chat) -> Pieces:
    found: Pieces = []
    for message in chat.messages:
        header, body = f"<|{message['role']}|>\n", message["content"] + "<|end|>"
        if message["role"] in ("system", "user", "assistant"):
            found += answer(header, "", body, "\n") if message["role"] == "assistant" else [(header + body + "\n", False)]
    return [*found, ("<|endoftext|>", False)]


COHERE_ROLES = {"system": "<|SYSTEM_TOKEN|>", "user": "<|USER_TOKEN|>", "assistant": "<|CHATBOT_TOKEN|>"}


def _cohere(chat: Chat) -> Pieces:
    found: Pieces = [("<BOS_TOKEN>", False)]
    for index, message in enumerate(chat.messages):
        role, content = message["role"], message["content"]
        header = "<|START_OF_TURN_TOKEN|>" + COHERE_ROLES.get(role, "")
        body = (content if role == "system" else content.strip()) + "<|END_OF_TURN_TOKEN|>"
        if role in ("user", "assistant") or (role == "system" and not index):
            found += answer(header, "", body, "") if role == "assistant" else [(header + body, False)]
    return found


def _cohere2(chat: Chat) -> Pieces:
    system = next((m["content"] for m in chat.messages if m["role"] == "system"), "")
    preamble = template_text("cohere2").split("{% break %}{% endif %}{% endfor %}")[1].split("{% if ns.system_prompt and")[0]
    developer = (
        template_text("cohere2").split('ns.system_prompt != "" %}')[1].split("{{ ns.system_prompt }}")[0].removeprefix("\n")
    )
    found: Pieces = [("<BOS_TOKEN>" + preamble + (developer + system if system else "") + "<|END_OF_TURN_TOKEN|>", False)]
    for message in chat.messages:
        role, content = message["role"], message["content"]
        if role == "system" and system and content == system:
            continue
        header = "<|START_OF_TURN_TOKEN|>" + COHERE_ROLES.get(role, "")
        if role == "assistant":
            body = content + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
            found += answer(header + "<|START_RESPONSE|>", "", body, "")
        else:
            found.append((header + ("" if role == "tool" else content) + "<|END_OF_TURN_TOKEN|>", False))
    return found


def _instruct(chat: Chat) -> Pieces:
    found: Pieces = [("<s>", False)]
    for message in chat.messages:
        is_answer = message["role"] == "assistant"
        found.append((message["content"] + "</s>" if is_answer else f"[INST] {message['content']} [/INST]", is_answer))
    return found


def _name(words: str) -> str:
    return f"<\uff5c{words}\uff5c>".replace(" ", "\u2581")


def _deepseek(joins_systems: bool) -> Callable[[Chat], Pieces]:
    """V3 joins system messages and writes calls; R1's distillations take the last one, and never get to a call of ours."""

    def pieces(chat: Chat) -> Pieces:
        systems = [m["content"] for m in chat.messages if m["role"] == "system"]
        system = "\n\n".join(systems) if joins_systems else "".join(systems[-1:])
        found: Pieces = [(_name("begin of sentence") + system, False)]
        end, has_called, after_tool, has_output = _name("end of sentence"), False, False, False
        for message in chat.messages:
            content, header, opened = message["content"], _name("Assistant"), "<think>\n"
            if message["role"] == "user":
                found.append((_name("User") + content, False))
                after_tool = False
            elif message["role"] == "assistant" and message.get("tool_calls") and joins_systems:
                after_tool, body, has_header = False, "", not has_called  # the template forgets it from the second message on
                for call in message["tool_calls"]:
                    body += "\n" if has_called else content + _name("tool calls begin")
                    body += _name("tool call begin") + call["type"] + _name("tool sep") + call["function"]["name"]
                    body += f"\n```json\n{call['function']['arguments']}\n```" + _name("tool call end")
                    has_called = True
                found += answer(header if has_header else "", opened, body + _name("tool calls end") + end, "")
            elif message["role"] == "assistant":
                if after_tool:  # V3 and R1 go on from the tool's output without a header
                    found += answer(_name("tool outputs end"), "", content + end, "")
                else:
                    found += answer(header, opened, content.split("</think>")[-1] + end, "")
                after_tool = False
            elif message["role"] == "tool":
                opens = ("" if joins_systems else "\n") if has_output else _name("tool outputs begin")
                found.append((opens + _name("tool output begin") + content + _name("tool output end"), False))
                after_tool = has_output = True
        return [*found, (_name("tool outputs end") if after_tool else "", False)]

    return pieces


def _gptoss_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    found = "# Tools\n\n## functions\n\nnamespace functions {\n\n"
    for tool in (tool["function"] for tool in tools):
        found += f"// {tool['description']}\ntype {tool['name']} = (_: {{\n"
        for name, given in tool["parameters"]["properties"].items():
            found += (f"// {given['description']}\n" if given["description"] else "") + f"{name}: {given['type']},\n"
        found += "}) => any;\n\n"
    return found + "} // namespace functions"


def _gptoss(chat: Chat) -> Pieces:
    """Without the first message, of the system, which `trained_pieces` takes from the text: it holds the date."""
    rest = list(chat.messages)
    developer = rest.pop(0)["content"] if rest[0]["role"] == "system" else ""
    instructions = f"# Instructions\n\n{developer}\n\n" if developer else ""
    tools = _gptoss_tools(chat.tools) if chat.tools else ""
    found: Pieces = [(f"<|start|>developer<|message|>{instructions}{tools}<|end|>" if instructions or tools else "", False)]
    called = ""
    for index, message in enumerate(rest):
        role, content, header = message["role"], message["content"], "<|start|>assistant"
        thinking = "<|channel|>analysis<|message|>{}<|end|>" + header
        if role == "user":
            found.append((f"<|start|>user<|message|>{content}<|end|>", False))
        elif role == "tool":
            found.append(
                (f"<|start|>functions.{called} to=assistant<|channel|>commentary<|message|>{as_json(content)}<|end|>", False)
            )
        elif role == "assistant" and "tool_calls" in message:
            function = message["tool_calls"][0]["function"]
            called = function["name"]
            is_answered = any(m["role"] == "assistant" and "tool_calls" not in m for m in rest[index + 1 :])
            said = content or message.get("thinking", "")
            body = thinking.format(said) if said and not is_answered else ""
            body += f" to=functions.{called}<|channel|>commentary json<|message|>{as_json(function['arguments'])}<|call|>"
            found += answer(header, "", body, "")
        elif role == "assistant":
            is_last = index + 1 == len(rest)
            body = thinking.format(message["thinking"]) if is_last and "thinking" in message else ""
            body += f"<|channel|>final<|message|>{content}{'<|return|>' if is_last else '<|end|>'}"
            found += answer(header, "", body, "")
    return found


_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
_COHERE = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", *COHERE_ROLES.values())
_DEEPSEEK = tuple(
    _name(words)
    for words in (
        "begin of sentence;end of sentence;User;Assistant;tool calls begin;tool calls end;tool call begin;tool call end;"
        "tool sep;tool outputs begin;tool outputs end;tool output begin;tool output end"
    ).split(";")
)
_QWEN3 = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_HARMONY = ("<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>")
_SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_LFM = (
    *_CHATML,
    "<|startoftext|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
)
_BOS, _EOS = _DEEPSEEK[:2]
_THINKS = ("system", "tools", "reasoning_content")

FAMILIES: Mapping[str, Family] = {
    "smollm2": Family("smollm2", _chatml(_SMOLLM), _CHATML, "<|im_start|>", "<|im_end|>"),
    "qwen2_5": Family("qwen2_5", qwen2_5, (*_CHATML, *_QWEN3[2:4]), "", "<|im_end|>", ("system", "tools")),
    "qwen3": Family("qwen3", qwen3, (*_CHATML, *_QWEN3), "", "<|im_end|>", _THINKS),
    "qwen3_training": Family("qwen3_training", qwen3_training, _CHATML, "", "<|im_end|>", _THINKS),
    "llama3": Family("llama3", _llama3, _LLAMA, _LLAMA[0], "<|eot_id|>"),
    "llama3_1": Family("llama3_1", _llama3_1, _LLAMA, _LLAMA[0], "<|eot_id|>", ("system", "tools")),
    "gemma": Family("gemma", _gemma, _GEMMA, "<bos>", "<eos>", ()),
    "gemma3": Family("gemma3", _gemma, _GEMMA, "<bos>", "<eos>"),
    "phi3": Family("phi3", _phi3, _PHI, "", "<|endoftext|>"),
    "cohere": Family("cohere", _cohere, _COHERE, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": Family("cohere2", _cohere2, (*_COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>"), "<BOS_TOKEN>", _COHERE[2]),
    "instruct": Family("instruct", _instruct, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", ()),
    "deepseekv3": Family("deepseekv3", _deepseek(True), _DEEPSEEK, _BOS, _EOS, ("system", "tools")),
    "deepseek_r1_distill": Family("deepseek_r1_distill", _deepseek(False), _DEEPSEEK, _BOS, _EOS, ("system", "tools")),
    "lfm2": Family("lfm2", _lfm2, _LFM, "<|startoftext|>", "<|im_end|>", ("system", "tools")),
    "gptoss": Family("gptoss", _gptoss, _HARMONY, "", "<|return|>", ("system", "tools", "thinking")),
    "qwen3_5_think": Family("qwen3_5_think", qwen3_5, (*_CHATML, *_QWEN3), "", "<|im_end|>", _THINKS),
    "nemotron_3_nano": Family("nemotron_3_nano", nemotron, (*_CHATML, *_QWEN3), "", "<|im_end|>", _THINKS),
}


def trained_pieces(family: Family, text: str, chat: Chat) -> Pieces:
    """The oracle's pieces; for gpt-oss with the first message, of the system, which holds the date."""
    pieces = family.pieces(chat)
    if family.template == "gptoss":
        found = re.match(r"<\|start\|>system<\|message\|>.*?<\|end\|>", text, re.DOTALL)
        assert found is not None, "it begins with the system's message"
        pieces = [(found[0], False), *pieces]
    return pieces
