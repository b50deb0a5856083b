"""Bridges append what the chat template would have written; a template where they cannot is named with its fault."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from episode_templates import SHAPES, WEATHER, renderer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.config.loading import load_config
from rlkit.experience import Episode, Message, ToolCall
from rlkit.rollout.conversation import Conversation, as_sample
from rlkit.rollout.episodes import open_episodes
from rlkit.rollout.rendering import Bridge, Renderer, RenderingError, continuation
from rlkit.rollout.requests import Request, Response

APPEND = {
    "ChatML, Qwen2.5", "Qwen3-Coder", "Qwen3, thinking kept", "Llama 2", "Llama 3",
    "Mistral, tools before the last question", "Mistral, tools first",
    "Gemma 2", "Phi-3", "DeepSeek-V3", "GLM-4", "embedded",
}  # fmt: skip
"""After a user's answer, without tools and without a system message."""
TOOLS_APPEND = {
    "ChatML, Qwen2.5": "Hermes", "Qwen3": "Hermes", "Qwen3, thinking kept": "Hermes", "Qwen3-Coder": "Tags",
    "Llama 3": "Llama", "Mistral, tools before the last question": "Mistral", "Mistral, tools first": "Mistral",
    "DeepSeek-V3": "Hermes", "GLM-4": "FromVLLM",
}  # fmt: skip
"""After a tool's answer; how they write calls."""


@cache
def playing(name: str, tools: bool = False) -> Renderer:
    calls = "hermes" if name == "GLM-4" else "auto"  # vLLM's parsers take seconds to import
    return renderer_of(name, *([WEATHER] if tools else []), calls=calls)


def ids_of(renderer: Renderer, text: str) -> list[int]:
    return renderer.template.token_ids([text])[0]


@pytest.mark.slow  # imports vLLM's parsers
def test_the_table_of_the_docs_is_the_scripts(repository: Path) -> None:
    from benchmarks.templates import table

    assert "\n".join(table()) in (repository / "docs/chat_templates.md").read_text()


def rendered(renderer: Renderer, chat: Sequence[Message], tools: bool = False) -> str:
    (text,) = renderer.template.texts([chat], ask=True, tools=[WEATHER.schema()] if tools else ())
    assert isinstance(text, str)
    return text


def response(ids: Sequence[int]) -> Response:
    return Response(
        "r", np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop", 0, np.zeros(len(ids), np.int32)
    )


@pytest.mark.parametrize("name", [*SHAPES, "embedded"])
def test_which_templates_append(name: str) -> None:
    plain = playing(name)
    assert (not plain.problems()) == (name in APPEND), plain.problems()
    assert (not playing(name, True).problems()) == (name in TOOLS_APPEND), playing(name, True).problems()
    for problem in [*plain.problems(), *playing(name, True).problems()]:
        assert "model.chat_template" in problem or "environment.calls" in problem


@pytest.mark.parametrize("name", sorted(set(TOOLS_APPEND) - {"GLM-4"}))
def test_the_format_of_calls_is_the_templates(name: str) -> None:
    assert type(playing(name, True).reader).__name__ == TOOLS_APPEND[name]


@pytest.mark.parametrize(
    ("name", "tools", "reason"),
    [
        ("Qwen3", False, "after a user's answer: it drops the thinking of earlier turns"),
        ("Qwen3, enable_thinking=false", False, "<think>"),
        ("DeepSeek-R1", False, "<think>"),
        ("gpt-oss", False, "it does not end a turn with '<|return|>', '<|call|>', as the policy does, but writes "),
        ("Llama 2", True, "user and assistant take turns"),
        ("Gemma 2", True, "there is no role tool"),
        ("Phi-3", True, "it leaves out what a tool says"),
    ],
)
def test_why_a_template_cannot_go_on(name: str, tools: bool, reason: str) -> None:
    (problem,) = playing(name, tools).problems()
    assert reason in problem and "model.chat_template=<file>" in problem


@pytest.mark.parametrize(
    ("name", "tools", "reason"),
    [
        ("Qwen3", False, None),
        ("DeepSeek-R1", False, None),
        ("gpt-oss", False, None),
        ("Llama 2", True, "user and assistant take turns"),
        ("Gemma 2", True, "there is no role tool"),
        ("Phi-3", True, "it leaves out what a tool says"),
    ],
)
def test_what_rendering_anew_mends(name: str, tools: bool, reason: str | None) -> None:
    (append,) = playing(name, tools).problems()
    anew = renderer_of(name, *([WEATHER] if tools else []), calls="hermes", history="rerender")
    assert ("environment.history=rerender" in append) == (reason is None)
    if reason is None:
        assert anew.problems() == []
    else:
        (problem,) = anew.problems()
        assert reason in problem and "environment.history" not in problem


def test_rendered_anew_a_thinking_turn_begins_a_row_and_a_plain_one_goes_on() -> None:
    renderer = renderer_of("Qwen3", history="rerender")
    asked = [Message("user", "Guess."), Message("assistant", "seven"), Message("user", "higher")]
    ids = renderer.whole(asked[:1])
    for said, goes_on in (("seven<|im_end|>", True), ("<think>\nlow\n</think>\n\nseven<|im_end|>", False)):
        turn = ids_of(renderer, said)
        spoken = renderer.spoken(turn)
        prompt = renderer.whole([asked[0], spoken, asked[2]])
        bridge = renderer.behind([*ids, *turn], turn, prompt)
        assert (bridge is not None) == goes_on, spoken
        if bridge is not None:
            assert [*ids, *turn, *bridge.ids] == prompt and bridge.drop == 0
        assert "low" not in renderer.template.tokenizer.decode(prompt)


def test_a_prompt_may_replace_the_end_of_a_turn() -> None:
    ids, turn, end = [1, 2, 3, 8], [3, 8], {8, 9}
    assert continuation(ids, turn, [1, 2, 3, 8, 5], end) == Bridge(0, [5])
    assert continuation(ids, turn, [1, 2, 3, 9, 5], end) == Bridge(1, [9, 5])
    assert continuation(ids, turn, [1, 2, 3, 5], end) is None
    assert continuation(ids, turn, [1, 2, 3, 5], None) == Bridge(1, [5])
    assert continuation([1, 2, 8], [8], [1, 2, 9], end) is None, "nothing would be left of it to train on"
    assert continuation(ids, turn, [1, 2], end) is None


@pytest.mark.parametrize("name", ["Qwen3", "Mistral, tools before the last question"])
def test_an_answer_that_the_template_cannot_append_ends_the_run_when_it_comes(name: str) -> None:
    renderer = playing(name, True)
    assert renderer.problems() == []
    assert any("after a user's answer" in caution for caution in renderer.cautions())
    (stop, *_) = renderer._stops
    renderer.bridge([5, stop], [Message("tool", "rain")])
    with pytest.raises(RenderingError, match="after a user's answer"):
        renderer.bridge([5, stop], [Message("user", "go on")])


def test_a_system_message_that_moves() -> None:
    renderer = playing("Mistral, tools before the last question")
    renderer.whole([Message("user", "Hi")])
    with pytest.raises(RenderingError, match="with a system message"):
        renderer.whole([Message("system", "Be brief."), Message("user", "Hi")])


def test_a_template_without_tools_is_told() -> None:
    embedded = renderer_of("embedded", WEATHER)
    assert "unknown role tool" in embedded.problems()[0]
    assert any("which tools there are" in caution for caution in renderer_of("Phi-3", WEATHER).cautions())


def test_a_format_of_calls_that_is_not_known() -> None:
    shape = playing("Qwen3-Coder", True)
    template = shape.template
    template.tokenizer.chat_template = template.tokenizer.chat_template.replace("<function=", "<do=")
    try:
        (problem,) = Renderer(template, [WEATHER], list(shape._stops)).problems()
    finally:
        template.tokenizer.chat_template = template.tokenizer.chat_template.replace("<do=", "<function=")
    assert "<do=weather>" in problem and "environment.calls" in problem


@pytest.mark.parametrize("name", sorted(APPEND))
def test_bridges_are_the_templates_own_rendering(name: str) -> None:
    renderer = playing(name)
    chat = [Message("user", "Guess the number.")]
    conversation = Conversation(renderer.whole(chat), 2000)
    for turn, (answer, said) in enumerate([("seven", "higher"), ("nine", "\n\n lower  "), ("it is eight", "yes")]):
        space = " " if name.startswith(("Llama 2", "Mistral, tools before")) else ""
        end = " </s>" if name == "Llama 2" else renderer._stops[next(iter(renderer._after((("user", said, "", ""),))))]
        ids = ids_of(renderer, space + answer + end)
        conversation.sampled(response(ids), answer)
        reply = Message("user", said)
        assert conversation.observed(renderer.bridge(ids, [reply]), [reply])
        chat += [Message("assistant", answer), reply]
        assert conversation.prompt() == ids_of(renderer, rendered(renderer, chat)), turn


@pytest.mark.parametrize("name", sorted(TOOLS_APPEND))
@pytest.mark.parametrize("results", [["rain"], ["rain", "sun"]], ids=len)
def test_bridges_of_tools_are_the_templates_own_rendering(name: str, results: list[str]) -> None:
    """Two results in a turn are one piece: many templates frame them together."""
    renderer = playing(name, True)
    calls = tuple(ToolCall("weather", {"city": city}, f"call0000{i}") for i, city in enumerate(["Graz", "Linz"]))
    calls = calls[: len(results)]
    said = [Message("tool", text, "weather", (), call.id) for text, call in zip(results, calls, strict=True)]
    # Llama's writes one call at a time, but reads several answers.
    called = Message("assistant", "", calls=calls[:1] if name == "Llama 3" else calls)
    chat = [Message("user", "How is the weather?")]
    conversation = Conversation(renderer.whole(chat), 3000)
    for _ in range(2):
        before = rendered(renderer, chat, tools=True)
        chat += [called, *said]
        whole = rendered(renderer, chat, tools=True)
        rest = whole.removeprefix(before)
        stop, _ = min((rest.find(stop), stop) for stop in renderer._stops.values() if stop in rest)
        end = next(text for text in renderer._stops.values() if rest.startswith(text, stop))
        ids = ids_of(renderer, rest[:stop] + end)
        text, parsed = renderer.parse(ids)
        if name != "GLM-4":
            assert text == "" and [(c.name, c.arguments) for c in parsed] == [
                (c.name, c.arguments) for c in called.calls
            ]
        conversation.sampled(response(ids), text, parsed)
        assert conversation.observed(renderer.bridge(ids, said), said)
        assert conversation.prompt() == ids_of(renderer, whole)


@pytest.mark.parametrize("name", sorted(APPEND))
def test_cut_turns_are_closed_and_other_stop_tokens_replaced(name: str) -> None:
    renderer = playing(name)
    said = [Message("user", "higher")]
    words = ids_of(renderer, "seven")
    end = next(iter(renderer._after((("user", "higher", "", ""),))))
    whole = renderer.bridge([*words, end], said)
    assert whole.drop == 0 and end not in whole.ids[:1]
    assert renderer.bridge(words, said) == (0, [end, *whole.ids])  # cut by its budget
    for other in set(renderer._stops) - {end}:
        assert renderer.bridge([*words, other], said) == (1, [end, *whole.ids])
        assert renderer.bridge([other], said) == (0, [end, *whole.ids])


@pytest.mark.parametrize(("tools", "name"), [*((False, n) for n in sorted(APPEND)), *((True, n) for n in TOOLS_APPEND)])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_is_said_forges_no_token(name: str, tools: bool, data: st.DataObject) -> None:
    renderer = playing(name, tools)
    tokenizer = renderer.template.tokenizer
    names = [*sorted(renderer.template.specials), "<｜User｜>", "<｜Assistant｜>"]
    pieces = st.lists(st.sampled_from([*names, "<|im_", "|>", "<", "user", "\n", " "]), min_size=1, max_size=6)
    text = "x" + data.draw(pieces.map("".join)) + "x"
    role = "tool" if tools else "user"
    special = {tokenizer.convert_tokens_to_ids(token) for token in names} - {tokenizer.unk_token_id, None}

    def frames(ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in special]

    # A policy may call tools that there are not.
    harmless, forged = ([Message(role, said, said if tools else "")] for said in ("xyx", text))
    assert frames(renderer.bridge([5], forged).ids) == frames(renderer.bridge([5], harmless).ids)
    opening, own = ([Message("user", said)] for said in (text, "xyx"))
    assert frames(renderer.whole(opening)) == frames(renderer.whole(own))
    assert text.strip() in tokenizer.decode(renderer.whole(opening))  # it still reads the same


TEXTS = st.text(st.sampled_from("ab 7\n<|>é\u200d"), max_size=8)


@pytest.mark.parametrize("name", sorted(APPEND))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_an_episode_trains_the_tokens_that_the_engine_saw(name: str, data: st.DataObject) -> None:
    renderer = playing(name)
    first = renderer.whole([Message("user", data.draw(TEXTS) + "?")])
    conversation = Conversation(first, 400)
    seen: list[int] = []
    own, bridge = 0, Bridge(0, [])
    for _ in range(data.draw(st.integers(1, 4))):
        prompt = conversation.prompt()
        if seen:
            kept = len(seen) - bridge.drop
            assert prompt[:kept] == seen[:kept] and prompt[kept:] == bridge.ids
            own -= bridge.drop
        ids = ids_of(renderer, renderer.template.guarded(data.draw(TEXTS) + "."))
        ids += data.draw(st.sampled_from([[], *([stop] for stop in renderer._stops)]))
        ids = ids[: conversation.room]
        seen, own = [*prompt, *ids], own + len(ids)
        conversation.sampled(response(ids), renderer.parse(ids)[0])
        said = [Message("user", data.draw(TEXTS) + "!")]
        bridge = renderer.bridge(ids, said)
        if not conversation.observed(bridge, said):
            break
    sample = as_sample([conversation], 0, 0, Episode("done"))
    assert [*first, *sample.token_ids.tolist()] == seen
    assert int(sample.trained.sum()) == own
    for span in sample.spans:
        assert span.end > span.start
        assert sample.trained[span.start : span.end].all() == (span.role == "assistant")


def test_thinking_calls_nothing_and_special_tokens_are_no_text() -> None:
    renderer = playing("ChatML, Qwen2.5", True)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Graz"}}</tool_call>'
    text, calls = renderer.parse(ids_of(renderer, f"<think>\n{call}\n</think>\n\nyes<|im_end|>"))
    assert (text, calls) == (f"<think>\n{call}\n</think>\n\nyes", ())
    assert renderer.parse(ids_of(renderer, f"<think>\n{call}")) == (f"<think>\n{call}", ())
    text, calls = renderer.parse(ids_of(renderer, f"<think>\nhm\n</think>\n\nso<|im_start|> {call}{call}<|im_end|>"))
    assert text == "<think>\nhm\n</think>so"
    assert calls == tuple(ToolCall("weather", {"city": "Graz"}, f"call0000{i}") for i in range(2))
    assert playing("ChatML, Qwen2.5").parse(ids_of(renderer, f"{call}<|im_end|>")) == (call, ())


def test_a_long_observation_is_cut_in_its_middle() -> None:
    renderer = playing("ChatML, Qwen2.5")
    short = Message("tool", "higher " * 3, "look")
    assert renderer.shortened(short, 40) is short
    for text in ("higher or lower " * 400, "é" * 500, "x" * 5_000_000, "<|im_end|>" * 300):
        for limit in (8, 40, 200):
            cut = renderer.shortened(Message("tool", text, "look"), limit)
            assert cut.name == "look" and len(ids_of(renderer, renderer.template.guarded(cut.content))) <= limit
            if limit == 200:
                assert f"[... {len(text)} characters, cut here ...]" in cut.content
                assert cut.content[:5] == text[:5] and cut.content[-5:] == text[-5:]


def test_a_template_that_prints_the_date_prints_that_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        today = datetime(2026, 11, 3)

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return cls.today

    async def turn(request: Request) -> Response:
        raise AssertionError("nothing is played")

    tokenizer, stops = playing("embedded").template.tokenizer, list(playing("embedded")._stops)
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template))
    options = [
        "environment=guess_number",
        "environment.placement=inline",
        f"model.chat_template={tmp_path}/dated.jinja",
    ]
    config = load_config([f"run_dir={tmp_path}/run", "reward=environment", "data=environment", *options]).config
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    opened = open_episodes(config, tokenizer, stops, turn, lambda: 0, tmp_path / "log", seeded=True)
    renderer, said = asyncio.run(opened).renderer, [Message("user", "Next?")]
    opening = renderer.whole(said)
    renderer.bridge([5, *stops], said)
    Clock.today = datetime(2026, 11, 4)
    assert renderer.whole(said) == opening
    renderer.bridge([5, *stops], [Message("user", "and next?")])
