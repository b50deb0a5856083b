"""The scripted players, what they teach, and the agent in the package."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from pathlib import Path

import pytest

from examples.embedded_models import agent_stages, remake
from examples.embedded_models.initial import CALL, train_agent_tokenizer
from examples.embedded_models.play import GAMES, Game, Match, Writer, scripted
from rlkit.data.rendering import ChatTemplate, load_tokenizer
from rlkit.environments.base import Action, as_messages
from rlkit.environments.games.hidden_facts import ANIMALS, COLOURS
from rlkit.environments.games.maze import MOVES
from rlkit.experience import Message, ToolCall
from rlkit.models.folder import EMBEDDED

LARGEST_FILE = 4 * 2**20
REPORT = json.loads((EMBEDDED / "report.json").read_text())["agent"]
TEMPLATE = ChatTemplate(train_agent_tokenizer([]))


def matches(game: Game, sensible: float, count: int = 100) -> list[Match]:
    async def played() -> list[Match]:
        rng, writer, tasks = random.Random(0), Writer(TEMPLATE, game), game.tasks("train", train_tasks=50)
        return [await scripted(game, rng.choice(tasks), writer, sensible, rng) for _ in range(count)]

    return asyncio.run(played())


@pytest.mark.parametrize("game", GAMES, ids=lambda game: game.name)
def test_sensible_players_win_and_careless_ones_often_do_not(game: Game) -> None:
    assert all(match.success for match in matches(game, 1.0))
    won = [match.success for match in matches(game, agent_stages.CARELESS)]
    assert 0.15 < sum(won) / len(won) < 0.9


@pytest.mark.parametrize("game", GAMES, ids=lambda game: game.name)
def test_what_is_imitated_is_what_the_template_writes_and_only_the_players_turns_are_trained(game: Game) -> None:
    tools = [tool.schema() for tool in game.environment.tools(game.environment.Config(), None)]
    for match in matches(game, 0.6, 20):
        sample = match.sample()
        ids = [*match.prompt, *sample.token_ids.tolist()]
        messages = [*match.task.messages, *match.conversation.messages]
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        (whole,) = TEMPLATE.texts([messages[: last + 1]], ask=False, tools=tools)
        assert TEMPLATE.tokenizer.decode(ids) == whole
        example = agent_stages._example(match)
        assert [*example.prompt, *example.target] == ids
        turns = [span for span in sample.spans if span.role == "assistant"]
        assert sum(example.trained or ()) == sum(turn.end - turn.start for turn in turns)
        assert all(ids[len(match.prompt) + turn.end - 1] == TEMPLATE.tokenizer.eos_token_id for turn in turns)


def test_calls_are_read_back_as_they_are_written() -> None:
    (calculator,) = (game for game in GAMES if game.name == "calculator")
    writer = Writer(TEMPLATE, calculator)
    ids = writer.turn(Action("", (ToolCall("calc", {"expression": '2*"3"'}),)))
    text, (call,) = writer.renderer.parse(ids)
    assert (text, call.name, call.arguments, call.error) == ("", "calc", {"expression": '2*"3"'}, "")
    assert writer.renderer.problems() == [] and writer.renderer.cautions() == []


def test_template_shows_tools_and_goes_on_behind_what_was_said() -> None:
    tokenizer = TEMPLATE.tokenizer
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}, "b": {}}}}}]
    (asked,) = TEMPLATE.texts([[Message("user", "Hi")]], ask=True, tools=tools)
    assert asked == "<|system|>f(a, b)<|user|>Hi<|assistant|>"
    said = [Message("user", "Hi"), Message("assistant", "", calls=(ToolCall("f", {"a": 1}),)), *as_messages("no")]
    (whole,) = TEMPLATE.texts([said], ask=False)
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert whole == f"<|user|>Hi<|assistant|>{call}<eos><|user|>no"
    assert tokenizer.decode(tokenizer.encode(call), skip_special_tokens=True) == call
    with pytest.raises(Exception, match="unknown role critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": ""}], tokenize=False)


# -- what is shipped -----------------------------------------------------------------------------------------------


def test_shipped_agent_is_small_is_the_reports_and_reads_moves_as_tokens() -> None:
    weights = EMBEDDED / "agent" / "model.safetensors"
    assert weights.stat().st_size <= LARGEST_FILE
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == REPORT["sha256"]
    tokenizer = load_tokenizer(EMBEDDED / "agent")
    words = ["higher", "lower", *MOVES, *ANIMALS, *COLOURS, *CALL, "<|tool|>"]
    for word in [*words, *(f"{number:02d}" for number in range(100)), *"0123456789"]:
        assert len(tokenizer.encode(word)) == 1, word
    assert tokenizer.chat_template == TEMPLATE.tokenizer.chat_template


@pytest.mark.slow
def test_shipped_agent_has_headroom() -> None:
    for game in GAMES:
        tasks = list(game.tasks("heldout", heldout_tasks=96))[:96]
        won = [match.success for match in asyncio.run(agent_stages.played(EMBEDDED / "agent", game, tasks, seed=5))]
        assert 0.02 <= sum(won) / len(won) <= 0.7, game.name
        assert 0.02 <= REPORT[game.name]["success"] <= 0.7


@pytest.mark.slow
def test_the_agent_alone_is_remade_and_the_rest_of_the_report_stays(tmp_path: Path, capsys) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"scale": "full", "seconds": {"base": 1.0}, "polar": {}}))
    assert remake.main([f"out={tmp_path}", "scale=fast", "only=agent"]) == 0
    capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["polar"] == {} and report["seconds"]["base"] == 1.0
    base = report["agent"]["base"]
    assert base["last_loss"] < 0.9 * base["first_loss"]
    assert {file.name for file in (tmp_path / "agent").iterdir()} == {
        file.name for file in (EMBEDDED / "agent").iterdir()
    }
    assert remake.main(["only=polcy"]) == 2 and "only=polcy: must be agent" in capsys.readouterr().err
