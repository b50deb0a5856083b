"""Calls of tools are read back from what policies write, and one that cannot be read says why."""

from __future__ import annotations

from typing import Any

import pytest
from episode_templates import WEATHER
from hypothesis import given
from hypothesis import strategies as st

from rlkit.environments.tool import Tool
from rlkit.experience import ToolCall, UserError
from rlkit.rollout.calls import Hermes, Llama, Mistral, Tags, call_format

MOVE = Tool(
    "move", "Moves.",
    {"type": "object", "properties": {"x": {"type": "integer"}, "fast": {"type": "boolean"}}, "required": ["x"]},
)  # fmt: skip
PUT = Tool(
    "put", "Puts.",
    {
        "type": "object",
        "properties": {"what": {"type": "string"}, "where": {"anyOf": [{"type": "number"}, {"type": "null"}]}},
        "required": ["what", "where"],
    },
)  # fmt: skip
TAGS = Tags([WEATHER, MOVE, PUT])


def test_hermes() -> None:
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call>'
    text, calls = Hermes().read(f"I look.\n{one}\n{one.removesuffix('</tool_call>')}")
    assert text == "I look."
    assert calls == (ToolCall("weather", {"city": "Graz"}),) * 2
    assert Hermes().read(" plain {} ") == (" plain {} ", ())


@pytest.mark.parametrize(
    ("body", "name", "why"),
    [
        ('{"name": "weather", "arguments": {"city": ', "weather", "not valid JSON"),
        ("weather(Graz)", "", "not valid JSON"),
        ('{"arguments": {}}', "", '"name"'),
        ('["weather"]', "", '"name"'),
        ('{"name": "weather", "arguments": [1]}', "weather", "a JSON object"),
        ('{"name": "weather", "arguments": "no"}', "weather", "not valid JSON"),
        ('{"name": "weather", "arguments": {"x": NaN}}', "weather", "NaN"),
        (r'{"name": "weather", "arguments": {"city": "\ud83d"}}', "weather", "surrogates not allowed"),
        ('{"name": "weather", "arguments": ' + "[" * 100_000, "weather", "not valid JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(body: str, name: str, why: str) -> None:
    _, (call,) = Hermes().read(f"<tool_call>{body}</tool_call>")
    assert call.name == name and call.arguments == {}
    assert why in call.error and len(call.error) < 300


def test_arguments_as_a_text_of_json_and_none_at_all() -> None:
    _, (text, none) = Hermes().read(
        '<tool_call>{"name": "a", "arguments": "{\\"k\\": 1}"}</tool_call><tool_call>{"name": "b"}</tool_call>'
    )
    assert (text, none) == (ToolCall("a", {"k": 1}), ToolCall("b"))


def test_llama() -> None:
    one = '{"name": "weather", "parameters": {"city": "Graz"}}'
    call = ToolCall("weather", {"city": "Graz"})
    assert Llama().read(one) == ("", (call,))
    assert Llama().read(f"<|python_tag|>{one}; {one}") == ("", (call, call))
    for answer in ('{"answer": 7}', "The name is Ann.", '{"name": "Ann"}'):
        assert Llama().read(answer) == (answer, ())
    _, (good, bad) = Llama().read(one + '; {"name": "weather", "parameters": {')
    assert good == call and bad.name == "weather" and bad.error


def test_mistral() -> None:
    listed = '[TOOL_CALLS] [{"name": "a", "arguments": {"k": 1}, "id": "abcdefghi"}, {"name": "b", "arguments": {}}]'
    assert Mistral().read(f"Hm {listed}") == ("Hm", (ToolCall("a", {"k": 1}, "abcdefghi"), ToolCall("b")))
    named = '[TOOL_CALLS]a[CALL_ID]abcdefghi[ARGS]{"k": 1}[TOOL_CALLS]b{}'
    assert Mistral().read(named) == ("", (ToolCall("a", {"k": 1}, "abcdefghi"), ToolCall("b")))
    _, (bad_id,) = Mistral().read('[TOOL_CALLS][{"name": "a", "arguments": {}, "id": "x"}]')
    assert bad_id == ToolCall("a")  # the template would refuse the conversation
    _, (cut,) = Mistral().read('[TOOL_CALLS]a[ARGS]{"k"')
    assert cut.name == "a" and "cannot be read" in cut.error
    assert Mistral().read("[TOOL_CALLS]")[1][0].error


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("<weather>Graz</weather>", "weather", {"city": "Graz"}),
        ("<weather>7</weather>", "weather", {"city": "7"}),
        ('<weather>{"city": "Graz"}</weather>', "weather", {"city": "Graz"}),
        ("<weather>Graz", "weather", {"city": "Graz"}),
        ("<move>3</move>", "move", {"x": 3}),
        ("<move>far</move>", "move", {"x": "far"}),
        ("<move><x>3</x><fast>true</fast></move>", "move", {"x": 3, "fast": True}),
        ("<move/>", "move", {}),
        ("<put><what>cup</what><where>1.5</where></put>", "put", {"what": "cup", "where": 1.5}),
        ("<function=move>\n<parameter=x>\n3\n</parameter>\n</function>", "move", {"x": 3}),
        ("<tool_call>\n<function=unknown>\n<parameter=x>\n3\n</parameter>\n</function>\n</tool_call>", "unknown",
         {"x": "3"}),
    ],
)  # fmt: skip
def test_tags(text: str, name: str, arguments: dict[str, Any]) -> None:
    assert TAGS.read(f"Well,\n{text}") == ("Well,", (ToolCall(name, arguments),))


def test_a_tag_with_several_arguments_and_none_of_their_tags_is_told_how() -> None:
    _, (call,) = TAGS.read("<put>cup</put>")
    assert call.name == "put" and "<put><what>...</what><where>...</where></put>" in call.error


def test_other_tags_are_text() -> None:
    text = "<b>weather</b> < move >"
    assert TAGS.read(text) == (text, ())


PARTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<move>", "</move>", "<function=move>", "<parameter=x>", "[TOOL_CALLS]", "[ARGS]",
     "<|python_tag|>", '{"name": ', '"move"', '"arguments": ', "{", "}", "[", "]", '"', ",", ";", "3", "x", " ", "\n"]
)  # fmt: skip


@given(st.lists(PARTS, max_size=14).map("".join))
def test_no_text_breaks_a_reader(text: str) -> None:
    for known in (Hermes(), Llama(), Mistral(), TAGS):
        rest, calls = known.read(text)
        assert isinstance(rest, str)
        assert calls or rest == text
        assert all(isinstance(call.arguments, dict) and not (call.error and call.arguments) for call in calls)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match=r"environment\.calls=jason: unknown; choose hermes"):
        call_format("jason", [WEATHER], None)  # type: ignore[arg-type]
