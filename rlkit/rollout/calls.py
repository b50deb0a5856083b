"""Readers of the formats in which policies write tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rlkit.environments.tool import Tool
from rlkit.experience import ToolCall, UserError

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerBase


class CallFormat(Protocol):
    def read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the text without its calls, and the calls; one that cannot be parsed has an `error`."""
        ...


class Hermes:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as written by Hermes and Qwen."""

    _CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)

    def read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        calls = tuple(_from_json(match[1]) for match in self._CALL.finditer(text))
        return self._CALL.sub("", text).strip() if calls else text, calls


class Llama:
    """`{"name": ..., "parameters": {...}}` instead of an answer, several separated by `;`, as written by Llama 3."""

    _CALL = re.compile(r'\s*\{.*"name"\s*:', re.DOTALL)
    _TAG = "<|python_tag|>"

    def read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        before, tag, body = text.partition(self._TAG)
        if not tag:
            before, body = "", text
            if not self._CALL.match(body) or not re.search(r'"(parameters|arguments)"\s*:', body):
                return text, ()
        calls = tuple(_from_json(part) for part in _objects(body))
        return (before.strip(), calls) if calls else (text, ())


class Mistral:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}, "id": ...}]`, or `[TOOL_CALLS]name[ARGS]{...}` for each."""

    _NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w+)\s*)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)

    def read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        before, *parts = text.split("[TOOL_CALLS]")
        if not parts:
            return text, ()
        return before.strip(), tuple(call for part in parts for call in self._calls(part))

    def _calls(self, part: str) -> Iterator[ToolCall]:
        named = self._NAMED.match(part)
        if named:
            value = _json(named[3])
            yield _call(named[1], value, named[2] or "")
            return
        value = _json(part)
        for item in value if isinstance(value, list) and value else [value]:
            yield _from_value(item, part)


class Tags:
    """A tag with the tool's name around its argument, a JSON object, or tags with its arguments, like
    `<search>who?</search>`; and `<function=NAME><parameter=NAME>...</parameter></function>`, as Qwen3-Coder writes."""

    _PARAMETER = re.compile(r"<parameter=([\w.-]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = {tool.name: tool for tool in tools}
        names = "|".join(re.escape(name) for name in sorted(self.tools, key=len, reverse=True)) or r"(?!)"
        self._call = re.compile(
            r"(?:<tool_call>\s*)?(?:"
            rf"<({names})\s*(?:/>|>(.*?)(?:</\1>|\Z))"
            r"|<function=([\w.-]+)>(.*?)(?:</function>|\Z)"
            r")(?:\s*</tool_call>)?",
            re.DOTALL,
        )

    def read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        calls = tuple(self._of(match) for match in self._call.finditer(text))
        return self._call.sub("", text).strip() if calls else text, calls

    def _of(self, match: re.Match[str]) -> ToolCall:
        if match[3] is not None:
            texts = {name: value.strip("\n") for name, value in self._PARAMETER.findall(match[4])}
            return ToolCall(match[3], self._typed(match[3], texts))
        name, body = match[1], (match[2] or "").strip()
        if body.startswith("{"):
            value = _json(body)
            if isinstance(value, dict) and set(value) <= set(self._parameters(name)):
                return _call(name, value)
        return self._plain(name, body)

    def _plain(self, name: str, body: str) -> ToolCall:
        parameters = self._parameters(name)
        texts = {
            key: inside[1].strip()
            for key in parameters
            if (inside := re.search(rf"<{re.escape(key)}>(.*?)</{re.escape(key)}>", body, re.DOTALL))
        }
        needed = self.tools[name].parameters.get("required") or list(parameters)
        if not texts and body:
            if len(needed) != 1:
                tags = "".join(f"<{key}>...</{key}>" for key in parameters)
                return ToolCall(name, error=f"write the arguments of {name} as <{name}>{tags}</{name}>")
            texts = {needed[0]: body}
        return ToolCall(name, self._typed(name, texts))

    def _parameters(self, name: str) -> Mapping[str, Any]:
        tool = self.tools.get(name)
        return {} if tool is None else tool.parameters.get("properties", {})

    def _typed(self, name: str, texts: Mapping[str, str]) -> dict[str, Any]:
        return {key: _typed(text, self._parameters(name).get(key, {})) for key, text in texts.items()}


@dataclass(frozen=True)
class FromVLLM:
    """vLLM's parser of that name. It does not distinguish a call that it cannot parse from an answer without calls."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Tool]

    def read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        try:
            return self.read_by_parser(text)
        except Exception:  # a policy's text may break a parser
            return text, ()

    def read_by_parser(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Read with vLLM's parser. Raises whatever the parser raises."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": ""}], tools=[tool.schema() for tool in self.tools]
        )
        parser = ToolParserManager.get_tool_parser(self.name)(self.tokenizer, request.tools)
        read = parser.extract_tool_calls(text, request)
        if not read.tools_called:
            return text, ()
        calls = (_call(call.function.name, _json(call.function.arguments)) for call in read.tool_calls)
        return (read.content or "").strip(), tuple(calls)


NAMES = ("hermes", "llama", "mistral", "tags")
OF_VLLM = {
    "<arg_key>": "vllm:glm45",
    "<|tool_call_begin|>": "vllm:kimi_k2",
    "<｜tool▁call▁begin｜>": "vllm:deepseek_v3",
    "functools[": "vllm:phi4_mini_json",
}
"""Text in a written call -> the parser of vLLM that reads it."""


def call_format(name: str, tools: Sequence[Tool], tokenizer: PreTrainedTokenizerBase) -> CallFormat:
    """Return the format of a name, or of `vllm:` and the name of a vLLM parser. Raises UserError for an unknown one, or
    one that needs tokens that the tokenizer does not have, or does not read text."""
    if name.startswith("vllm:"):
        from vllm.tool_parsers import ToolParserManager

        known = ToolParserManager.list_registered()
        if name.removeprefix("vllm:") not in known:
            raise UserError(f"environment.calls={name}: vLLM has no such parser; it has {', '.join(known)}")
        parser = FromVLLM(name.removeprefix("vllm:"), tokenizer, tools)
        try:
            parser.read_by_parser("")
        except Exception as error:
            why = f"vLLM's parser cannot read this model's texts ({type(error).__name__}: {error})"
            raise UserError(f"environment.calls={name}: {why}; choose another") from error
        return parser
    formats: dict[str, CallFormat] = {
        "hermes": Hermes(), "llama": Llama(), "mistral": Mistral(), "tags": Tags(tools)
    }  # fmt: skip
    if name not in formats:
        raise UserError(f"environment.calls={name}: unknown; choose {', '.join(formats)}, auto or vllm:NAME")
    return formats[name]


class _Unreadable(str):
    """Why a text is not JSON."""


def _json(text: str) -> Any:
    """Return the value, or why there is none."""
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # "\\ud83d" is half a character, which no tokenizer accepts
        return value
    except (ValueError, RecursionError) as error:
        return _Unreadable(f"it is not valid JSON ({error})")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _objects(body: str) -> list[str]:
    """Split consecutive JSON objects into texts; from one that does not end, the rest is one text."""
    decoder = json.JSONDecoder(strict=False)
    parts: list[str] = []
    body = body.strip()
    while body:
        try:
            _, end = decoder.raw_decode(body)
        except (ValueError, RecursionError):
            return [*parts, body]
        parts.append(body[:end])
        body = body[end:].lstrip("; \n\t")
    return parts


def _from_json(text: str) -> ToolCall:
    return _from_value(_json(text), text)


def _from_value(value: Any, text: str) -> ToolCall:
    if isinstance(value, _Unreadable):
        name = re.search(r'"name"\s*:\s*"([^"]*)"', text)
        return ToolCall(name[1] if name else "", error=f"the call cannot be read: {value}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ToolCall("", error='a call is a JSON object with "name" and "arguments"')
    arguments = value.get("arguments", value.get("parameters", {}))
    return _call(value["name"], arguments, value.get("id", ""))


def _call(name: str, arguments: Any, id: Any = "") -> ToolCall:
    if isinstance(arguments, str) and not isinstance(arguments, _Unreadable):
        arguments = _json(arguments)  # some models write them as a JSON string
    if isinstance(arguments, _Unreadable):
        return ToolCall(name, error=f"the arguments of {name} cannot be read: {arguments}")
    if not isinstance(arguments, dict):
        return ToolCall(name, error=f"the arguments of {name} are a JSON object")
    # Mistral's templates refuse other ids.
    own = id if isinstance(id, str) and re.fullmatch(r"[a-zA-Z0-9]{9}", id) else ""
    return ToolCall(name, arguments, own)


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """Return the parsed value if the schema asks for something other than text and this is JSON, else the text."""
    kinds = {schema.get("type"), *(option.get("type") for option in schema.get("anyOf", ()))}
    if "string" in kinds or kinds == {None}:
        return text
    value = _json(text.strip())
    return text if isinstance(value, _Unreadable) else value
