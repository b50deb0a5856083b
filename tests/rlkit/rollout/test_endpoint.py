"""Agents that own their loop, through real clients over HTTP, with a scripted player in the engine's place."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from agent_player import QUESTION, STOPS, TOKENIZER, Table, answered, client, code, inline, post
from openai import AsyncOpenAI
from own_agents import Calculating

from rlkit.data.rendering import ChatTemplate
from rlkit.environments.agent import Agent, Endpoint
from rlkit.environments.base import EnvironmentFailure, Step, Task
from rlkit.environments.games.calculator import Calculator
from rlkit.environments.tool import Tool
from rlkit.experience import ToolCall
from rlkit.rollout.endpoint import Server
from rlkit.rollout.environment_processes import ProcessHost
from rlkit.rollout.rendering import Renderer, RenderingError
from rlkit.rollout.requests import sample_seed

CALLS = '<tool_call>{"name": "calc", "arguments": {"expression": "41*59+59"}}</tool_call>'
ASKS = {"messages": [{"role": "user", "content": "2+2?"}]}
GOES_ON = [{"role": "assistant", "content": "4"}, {"role": "user", "content": "5?"}]


def test_an_agent_samples_what_the_same_environment_samples_by_steps() -> None:
    table, steps = Table(CALLS, "2478"), Table(CALLS, "2478")
    own, by_steps = table.play(host=inline(Calculating)), steps.play(host=inline(Calculator))
    assert own.token_ids.tolist() == by_steps.token_ids.tolist() and table.prompt == steps.prompt
    assert [list(r.prompt) for r in table.asked] == [list(r.prompt) for r in steps.asked]
    assert own.mask is not None and by_steps.mask is not None and own.mask.tolist() == by_steps.mask.tolist()
    assert [(s.start, s.end, s.role, s.data) for s in own.spans] == [
        (s.start, s.end, s.role, s.data) for s in by_steps.spans
    ]
    assert own.episode is not None and by_steps.episode is not None
    assert own.episode.messages == by_steps.episode.messages and own.episode.success and own.episode.ended == "done"
    call = ToolCall("calc", {"expression": "41*59+59"}, "call00000")
    assert own.episode.messages[0].calls == (call,) and own.text == "2478"
    assert [s.data["reward"] for s in own.spans if s.role == "assistant"] == [0.0, 1.0]
    assert 0 <= own.episode.waited < own.episode.seconds
    seed = sample_seed(11, "00000005", 0)
    assert own.seed == seed
    assert [r.seed for r in table.asked] == [sample_seed(seed, " ".join(map(str, r.prompt)), 0) for r in table.asked]


def test_an_agent_in_a_process_of_its_own(tmp_path: Path) -> None:
    config = Calculating.Config()
    host = ProcessHost("own_agents.Calculating", Calculating, config, tmp_path / "log", 60.0)
    inside, beside = Table(CALLS, "1"), Table(CALLS, "1")
    one, other = inside.play(host=inline(Calculating)), beside.play(host=host)
    assert one.token_ids.tolist() == other.token_ids.tolist() and inside.asked == beside.asked
    assert other.episode is not None and other.episode.success is False and not other.episode.failure


def test_tokens_in_and_tokens_out() -> None:
    async def run(model: Endpoint) -> Step:
        first = (await post(model, {**ASKS, "return_token_ids": True, "logprobs": True})).json()
        sampled = first["choices"][0]["token_ids"]
        self_first.extend([*first["prompt_token_ids"], *sampled])
        assert [c["logprob"] for c in first["choices"][0]["logprobs"]["content"]] == [-1.0, -2.0]
        more = TOKENIZER.encode("5?", add_special_tokens=False)
        generate = "/inference/v1/generate"
        body = {"token_ids": [*first["prompt_token_ids"], *sampled, *more], "sampling_params": {"max_tokens": 9}}
        second = (await post(model, body, generate)).json()["choices"][0]
        assert second["finish_reason"] == "stop" and second["token_ids"][-1] == STOPS[0]
        assert [c["token_id"] for c in second["logprobs"]["content"]] == second["token_ids"]
        # A client that ends turns itself leaves out the sampled end.
        body["token_ids"] += [*second["token_ids"][:-1], *more]
        third = (await post(model, body, generate)).json()["choices"][0]
        self_seen.extend([*body["token_ids"], *third["token_ids"]])
        # Neither is its end: other tokens, and a turn that was continued already.
        other = {**body, "token_ids": [3, *body["token_ids"]]}
        assert (await post(model, other, generate)).json()["choices"][0]["finish_reason"] == "stop"
        fork = {"messages": [*ASKS["messages"], *GOES_ON], "return_token_ids": True}
        forked = (await post(model, fork)).json()
        assert forked["prompt_token_ids"][: len(self_first)] == self_first
        return Step(reward=1.0)

    self_seen, self_first = list[int](), list[int]()
    table = Table("4", "five", "six", "7", "8")
    sample = table.play(run)
    assert len(sample.segments) == 3
    rows = [[*s.context.tolist(), *sample.token_ids[s.start : s.end].tolist()] for s in sample.segments]
    assert rows[0] == self_seen and sample.segments[0].context.tolist() == list(table.prompt.token_ids)
    spans = [span.role for span in sample.spans]
    assert spans == ["assistant", "user", "assistant", "user", "assistant", "assistant", "assistant"]
    assert sample.mask is not None and sample.logprobs is not None and sample.logprobs[sample.mask].all()
    assert not sample.logprobs[~sample.mask].any() and [r.max_tokens for r in table.asked][1:4] == [9, 9, 9]


def test_equal_calls_are_sampled_once() -> None:
    async def run(model: Endpoint) -> Step:
        table.free.clear()
        calls = [asyncio.create_task(post(model, ASKS)) for _ in range(3)]
        while not table.asked:
            await asyncio.sleep(0.01)
        shorter = asyncio.create_task(post(model, {**ASKS, "max_tokens": 3}))
        while len(table.asked) < 2:
            await asyncio.sleep(0.01)
        table.free.set()
        assert (await shorter).json()["choices"][0]["message"]["content"] == "5"
        answers = [answer.json() for answer in await asyncio.gather(*calls)]
        assert answers[0] == answers[1] == answers[2] and answers[0]["choices"][0]["message"]["content"] == "4"
        assert (await post(model, ASKS, x_stainless_retry_count="1")).json()["id"] == answers[0]["id"]
        assert (await post(model, ASKS)).json()["choices"][0]["message"]["content"] == "6", "another try"
        return Step(reward=1.0)

    table = Table("4", "5", "6")
    sample = table.play(run)
    assert len(table.asked) == len(sample.segments) == 3 and len({r.seed for r in table.asked}) == 3
    assert len({s.context.tobytes() for s in sample.segments}) == 1, "one prompt, three tries"


def test_a_client_that_lost_its_connection_gets_the_answer_by_a_retry() -> None:
    async def run(model: Endpoint) -> Step:
        table.free.clear()
        asyncio.get_running_loop().call_later(0.6, table.free.set)
        own = AsyncOpenAI(base_url=model.base_url, api_key=model.api_key, timeout=0.3, max_retries=5)
        answer = await own.chat.completions.create(model=model.model, messages=ASKS["messages"])  # type: ignore[arg-type]
        assert answer.choices[0].message.content == "4" and answer.usage is not None
        return Step(reward=1.0)

    table = Table("4")
    assert len(table.play(run).spans) == 1 and len(table.asked) == 1


def test_what_comes_after_the_end_samples_nothing() -> None:
    kept: list[Endpoint] = []
    late: list[asyncio.Task[httpx.Response]] = []

    async def run(model: Endpoint) -> Step:
        await post(model, ASKS)
        table.free.clear()
        late.append(asyncio.create_task(post(model, {"messages": [*ASKS["messages"], *GOES_ON]})))
        while len(table.asked) < 2:
            await asyncio.sleep(0.01)
        kept.append(model)
        return Step(reward=1.0)

    class Does(Agent):
        async def run(self, task: Task, model: Endpoint) -> Step:
            return await run(model)

        async def close(self) -> None:  # while the server is still there
            assert code(await late[0]) == "episode_ended" and (await late[0]).status_code == 410
            assert (await post(kept[0], ASKS)).status_code == 410
            closed.append(True)

    closed: list[bool] = []
    table = Table("4", "5")
    sample = table.play(host=inline(Does))
    assert closed and [s.role for s in sample.spans] == ["assistant"] and sample.text == "4"


def test_a_shortened_history_and_a_second_agent_are_rows_of_one_sample() -> None:
    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    async def run(model: Endpoint) -> Step:
        said: list[Any] = [user(QUESTION.content)]
        for _ in range(2):
            said += [{"role": "assistant", "content": await answered(model, said)}, user("Go on.")]
        helped = await answered(model, [user("Help.")])
        short = [said[0], user(f"You said {said[1]['content']}, and others {helped}.")]
        return Step(reward=float(await answered(model, short) == "the end"), success=True)

    table = Table("one", "two", "three", "the end")
    sample = table.play(run)
    assert sample.episode is not None and sample.episode.success and sample.text == "the end"
    opening, helper, last = sample.segments
    assert opening.context.tolist() == list(table.prompt.token_ids) and opening.messages == ()
    assert table.prompt.messages == (QUESTION,)
    assert [m.content for m in helper.messages] == ["Help."]
    assert [m.content for m in last.messages] == [QUESTION.content, "You said one, and others three."]
    rewards = [span.data["reward"] for span in sample.spans if span.role == "assistant"]
    assert rewards == [0.0, 0.0, 0.0, 1.0], "once, for all of it"
    assert [m.content for m in sample.episode.messages] == ["one", "Go on.", "two", "three", "the end"]
    assert sample.spans[-1].end == len(sample) > sample.length


def test_an_agent_whose_opening_differs_from_sample_to_sample() -> None:
    clock = iter(["10:31", "10:32"])

    async def run(model: Endpoint) -> Step:
        await answered(model, [{"role": "user", "content": f"{QUESTION.content} It is {next(clock)}."}])
        return Step("what it makes of it", reward=1.0)

    group = Table("4", "4").group(run)
    one, other = group.samples
    assert not one.segments and [len(segment.messages) for segment in other.segments] == [1]
    assert one.text == other.text == "what it makes of it" and one.token_ids.tolist() == other.token_ids.tolist()


def test_a_call_that_the_template_cannot_render_is_refused() -> None:
    async def run(model: Endpoint) -> Step:
        await answered(model, ASKS["messages"])
        answer = await post(model, {"messages": [{"role": "user", "content": "x"}]})
        assert code(answer) == "cannot_be_rendered" and "only one question" in answer.text
        raise RuntimeError("and the agent gave up")

    class Strict(Renderer):
        def whole(self, messages: Any) -> list[int]:
            if messages[0].content == "x":
                raise RenderingError("only one question")
            return super().whole(messages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent_player.Renderer", Strict)
        sample = Table("4").play(run)
    assert sample.episode is not None and sample.episode.failure == "refused: only one question"


def test_budgets_are_the_policys_doing() -> None:
    async def run(model: Endpoint) -> Step:
        await post(model, ASKS)
        async with client(model) as own:
            messages: Any = [*ASKS["messages"], *GOES_ON]
            await own.chat.completions.create(model=model.model, messages=messages)
        return Step(reward=1.0)

    async def forgiving(model: Endpoint) -> Step:
        with pytest.raises(openai.BadRequestError, match="used up"):
            await run(model)
        return Step(reward=0.5)

    for options, ended in (({"max_turns": 1}, "turns"), ({"tokens": 4}, "tokens")):
        for player, reward, success in ((run, 0.0, False), (forgiving, 0.5, None)):
            sample = Table("4", "5").play(player, **options)
            assert sample.episode is not None and (sample.episode.ended, sample.episode.success) == (ended, success)
            assert sample.spans[-1].data["reward"] == reward and sample.finish_reason == "length"


def test_fields_that_cannot_be_had_are_refused_and_those_of_the_run_are_said(caplog: pytest.LogCaptureFixture) -> None:
    async def run(model: Endpoint) -> Step:
        for body, why in (
            ({"n": 2}, "n=2"),
            ({"stop": ["x"]}, "stop=['x']"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ):
            answer = await post(model, {**ASKS, **body})
            assert answer.status_code == 400 and why in answer.text
        tokens = {"token_ids": [3], "sampling_params": {"stop_token_ids": [77]}}
        assert "no turn of this policy ends with 77" in (await post(model, tokens, "/inference/v1/generate")).text
        async with client(model) as own:
            assert [m.id async for m in own.models.list()] == [model.model]
        fine: dict[str, Any] = {"n": 1, "stop": [], "temperature": 0.2, "seed": 3, "max_tokens": 1, "user": "me"}
        answer = await post(model, {**ASKS, **fine})
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        return Step(reward=1.0)

    table = Table("4 and more")
    sample = table.play(run)
    (request,) = table.asked
    assert (request.temperature, request.max_tokens, len(sample)) == (1.0, 1, 1)
    assert "agents' calls set seed, temperature, which has no effect" in caplog.text


def test_a_stream_is_one_piece() -> None:
    async def run(model: Endpoint) -> Step:
        tools: Any = [tool.schema() for tool in Calculator.tools(None, None)]
        messages: Any = [{"role": "user", "content": QUESTION.content}]
        async with client(model) as own:
            stream = await own.chat.completions.create(model="policy", messages=messages, tools=tools, stream=True)
            pieces = [piece async for piece in stream]
        (call,) = pieces[0].choices[0].delta.tool_calls or ()
        assert call.function is not None and json.loads(call.function.arguments or "") == {"expression": "41*59+59"}
        assert pieces[-1].choices[0].finish_reason == "tool_calls" and pieces[-1].usage is not None
        return Step()

    Table(CALLS).play(run)


def test_a_call_that_cannot_be_read_is_a_text_and_counted() -> None:
    async def run(model: Endpoint) -> Step:
        tools = [tool.schema() for tool in Calculator.tools(None, None)]
        message = (await post(model, {**ASKS, "tools": tools})).json()["choices"][0]["message"]
        assert "tool_calls" not in message and message["content"] == "<tool_call>{oops</tool_call>"
        more = [*ASKS["messages"], message, {"role": "user", "content": "What?"}]
        assert (await post(model, {"messages": more, "tools": tools})).status_code == 200
        assert (await post(model, {"messages": more})).status_code == 200, "without its tools"
        return Step()

    sample = Table("<tool_call>{oops</tool_call>", "4", "5").play(run)
    assert sorted(s.data["malformed"] for s in sample.spans if s.role == "assistant") == [0, 0, 1]
    assert len(sample.segments) == 2


def test_half_a_character_in_a_call_is_a_question_mark() -> None:
    async def run(model: Endpoint) -> Step:
        called = {"id": "a", "function": {"name": "calc", "arguments": r'{"expression": "\ud83d"}'}}
        said = [
            {"role": "user", "content": "cut: \ud83d"},
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "content": "\ud83d", "tool_call_id": "a"},
        ]
        tools = [tool.schema() for tool in Calculator.tools(None, None)]
        assert (await post(model, {"messages": said, "tools": tools})).status_code == 200
        return Step(reward=1.0)

    table = Table("4")
    assert table.play(run).episode is not None
    text = TOKENIZER.decode(table.asked[0].prompt)
    assert "cut: ?" in text and '"expression": "?"' in text


def test_an_agent_that_breaks_begins_again_with_the_same_seeds() -> None:
    tries: list[str] = []

    async def run(model: Endpoint) -> Step:
        tries.append(model.base_url)
        await post(model, ASKS)
        await post(model, {"messages": [*ASKS["messages"], *GOES_ON]})
        if len(tries) == 1:
            raise EnvironmentFailure("the shop is away")
        assert (await post(Endpoint(tries[0], "", ""), ASKS)).status_code == 410
        return Step(reward=1.0)

    table = Table("4", "5", "4", "5")
    sample = table.play(run)
    assert sample.episode is not None and sample.episode.ended == "done" and len(sample.spans) == 3
    first, again = table.asked[:2], table.asked[2:]
    assert [(r.prompt, r.seed) for r in first] == [(r.prompt, r.seed) for r in again]
    assert len({r.id for r in table.asked}) == 4


def test_an_agent_that_asks_nothing_has_failed() -> None:
    async def run(model: Endpoint) -> Step:
        return Step(reward=1.0)

    sample = Table().play(run)
    assert sample.episode is not None and sample.episode.failure.startswith("nothing_sampled")


def test_a_fault_of_the_engine_ends_the_run_though_the_agent_goes_on() -> None:
    async def run(model: Endpoint) -> Step:
        assert code(await post(model, ASKS)) == "episode_failed"
        return Step(reward=1.0)

    with pytest.raises(IndexError):
        Table().play(run)


def test_a_conversation_goes_on_though_the_renderer_of_its_tools_had_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(model: Endpoint) -> Step:
        for body in (ASKS, {**ASKS, "tools": tools}, {"messages": [*ASKS["messages"], *GOES_ON]}):
            await post(model, body)
        return Step(reward=1.0)

    monkeypatch.setattr("rlkit.rollout.endpoint.MOST_RENDERERS", 1)
    tools = [tool.schema() for tool in Calculator.tools(None, None)]
    table = Table(" 4", "x", "5")  # rendered again it would lose its space
    assert len(table.play(run).segments) == 2
    server = Server(lambda tools: Renderer(ChatTemplate(TOKENIZER), tools, STOPS), STOPS)
    one, again = ([Tool("calc", "Of one.", {})], [Tool("calc", "Of another.", {})])
    assert server.renderer(one) is server.renderer(one)
    assert server.renderer(again) is not server.renderer(one) and len(server._renderers) == 1


def test_a_template_that_cannot_go_on_with_the_tools_is_said() -> None:
    class Mute(Renderer):
        def problems(self) -> list[str]:
            return ["it writes no calls"] if self.tools else []

    server = Server(lambda tools: Mute(ChatTemplate(TOKENIZER), tools, STOPS), STOPS)
    assert server.renderer(()) is server.renderer(())
    with pytest.raises(Exception, match="it writes no calls"):
        server.renderer([Tool("look", "Looks.", {})])
