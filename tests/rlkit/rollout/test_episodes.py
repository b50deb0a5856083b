"""Episodes with a scripted player in the engine's place: turns, budgets, failures, seeds; and what a host refuses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from counting import Counting
from paths import FIXTURES

from rlkit.config.loading import load_config
from rlkit.data.rendering import ChatTemplate, load_tokenizer
from rlkit.environments.base import Action, Environment, EnvironmentFailure, Step, Task
from rlkit.experience import Group, Message, Prompt
from rlkit.models.folder import model_folder
from rlkit.rollout.engine import stop_token_ids
from rlkit.rollout.episodes import Episodes
from rlkit.rollout.hosts import InlineHost
from rlkit.rollout.rendering import Renderer
from rlkit.rollout.requests import GroupRequest, Request, Response, sample_seed

FOLDER = str(model_folder("embedded:policy"))
TOKENIZER = load_tokenizer(FOLDER)
STOPS = stop_token_ids(FOLDER, TOKENIZER)
ANEW: dict[str, Any] = {"template": FIXTURES / "forgetful.jinja", "history": "rerender"}
PROMPT = Prompt("train-3", (), (1, 2), answer="4", columns={"start": 3})
Player = Callable[[str, Request], str]


class Table:
    """An environment, and a player who sees the whole text so far."""

    def __init__(
        self, cls: type[Environment], player: Player, *options: str, template: Path | None = None, **own: Any
    ) -> None:
        self.template = ChatTemplate(TOKENIZER, template)
        self.asked: list[Request] = []
        self.player = player
        arguments = ["run_dir=/tmp/never", "reward=rule", *options]
        self.rollout = load_config(arguments).config.rollout
        self.options = cls.Config(**own)
        self.host = InlineHost(cls, self.options)

    async def turn(self, request: Request) -> Response:
        self.asked.append(request)
        await asyncio.sleep(0)
        said = self.player(TOKENIZER.decode(request.prompt), request)
        ids = [*TOKENIZER.encode(said, add_special_tokens=False), STOPS[-1]]
        cut = ids[: request.max_tokens]
        logprobs = -np.arange(1, len(cut) + 1, dtype=np.float32)
        versions = np.full(len(cut), 7, np.int32)
        return Response(request.id, np.array(cut, np.int32), logprobs, "stop" if cut == ids else "length", 0, versions)

    def play(self, samples: int = 2, greedy: bool = False, rows: int = 0, **options: Any) -> Group:
        return asyncio.run(self.group(samples, greedy, rows, **options))

    async def group(self, samples: int = 2, greedy: bool = False, rows: int = 0, **options: Any) -> Group:
        await self.host.start()
        renderer = Renderer(self.template, self.host.tools, STOPS, history=self.options.history)
        episodes = Episodes(
            self.host, renderer, self.options, self.rollout, True, STOPS, self.turn, lambda: 7, None, rows
        )
        request = GroupRequest("00000005", PROMPT, samples, seed=11, step=1, greedy=greedy, **options)
        return await episodes.group(request)


def counts(text: str, request: Request) -> str:
    """Plays Counting rightly."""
    words = text.replace(".", " ").split()
    last = [int(word) for word in words if word.isdigit()][-1]
    return str(last + 1)


def test_turns_follow_each_other_token_by_token() -> None:
    table = Table(Counting, counts)
    group = table.play()
    one, other = group.samples
    assert one.episode is not None and (one.episode.ended, one.episode.success) == ("done", True)
    start = 3 + sample_seed(11, "00000005", "environment") % 3
    assert [m.content for m in group.prompt.messages] == [f"Count on from {start}."]
    said = [(message.role, message.content) for message in one.episode.messages]
    assert said[:3] == [
        ("assistant", str(start + 1)),
        ("user", f"It was {start + 1}. Next?"),
        ("assistant", str(start + 2)),
    ]
    # What the engine saw is what is trained on: every prompt is the one before, its answer, and an observation.
    mine = sorted((r for r in table.asked if r.id.startswith("00000005:0:")), key=lambda r: len(r.prompt))
    whole = [*group.prompt.token_ids, *one.token_ids.tolist()]
    assert [whole[: len(request.prompt)] for request in mine] == [list(request.prompt) for request in mine]
    assert mine[0].prompt == list(group.prompt.token_ids)
    assert one.mask is not None and one.length < len(one)
    assert [s.role for s in one.spans] == ["assistant", "user", "assistant", "user", "assistant"]
    assert [s.data["reward"] for s in one.spans if s.role == "assistant"] == [1.0, 1.0, 1.0]
    assert [s.data["state"] for s in one.spans if s.role == "assistant"] == [str(start + n) for n in (1, 2, 3)]
    assert one.text == str(start + 3) and one.finish_reason == "stop" and one.policy_versions == (7, 7)
    assert one.logprobs is not None and not one.logprobs[~one.mask].any() and one.logprobs[one.mask].all()
    # Seeds: the first turn's is that of a single response.
    assert [r.seed for r in mine] == [sample_seed(11, "00000005", k) for k in (0, "0.1", "0.2")]
    assert one.seed == mine[0].seed and other.seed == sample_seed(11, "00000005", 1)


def thinks(text: str, request: Request) -> str:
    return f"<think>after {text[-6:-1]}</think>{counts(text, request)}"


def test_what_a_template_rewrites_is_a_row_of_its_own() -> None:
    """Its thoughts go once a turn is over, so that every turn is one."""
    table = Table(Counting, thinks, "rollout.max_response_tokens=200", **ANEW)
    group = table.play()
    for sample in group.samples:
        assert sample.episode is not None and sample.episode.ended == "done"
        assert [m.role for m in sample.episode.messages] == ["assistant", "user"] * 2 + ["assistant"], "said once"
        first, *others = sample.segments
        assert first.context.tolist() == list(group.prompt.token_ids) and len(others) == 2
        mine = [r for r in table.asked if r.id.startswith(f"00000005:{sample.index}:")]
        assert [list(r.prompt) for r in mine] == [s.context.tolist() for s in sample.segments]
        texts = [TOKENIZER.decode(s.context) for s in sample.segments]
        assert not any("think" in text for text in texts), "the template has dropped it"
        assert sample.mask is None or sample.mask.all()
        assert [s.role for s in sample.spans] == ["assistant"] * 3
        assert [s.data["reward"] for s in sample.spans] == [1.0, 1.0, 1.0]
        whole = [TOKENIZER.decode(sample.token_ids[s.start : s.end], skip_special_tokens=True) for s in sample.segments]
        said = [m.content for m in sample.episode.messages if m.role == "assistant"]
        assert whole == said and all(text.startswith("<think>") for text in said)
    # Without thoughts the second turn goes on behind the first; then the template forgets the first question's answer.
    plain = Table(Counting, counts, **ANEW).play(samples=1).samples[0]
    assert [s.role for s in plain.spans] == ["assistant", "user", "assistant", "assistant"]
    assert len(plain.segments) == 2 and plain.length < len(plain)


def test_rendered_anew_a_template_that_appends_changes_nothing() -> None:
    one = Table(Counting, thinks, "rollout.max_response_tokens=200").play()
    other = Table(Counting, thinks, "rollout.max_response_tokens=200", history="rerender").play()
    for appended, anew in zip(one.samples, other.samples, strict=True):
        assert not anew.segments and anew.spans == appended.spans
        assert anew.token_ids.tolist() == appended.token_ids.tolist()
    assert one.prompt == other.prompt


def test_what_cannot_be_rendered_later_is_the_samples_failure() -> None:
    class Rude(Counting):
        def step(self, action: Action) -> Step:
            return replace(super().step(action), observation=Message("narrator", "Meanwhile"))

    sample = Table(Rude, counts, **ANEW).play(samples=1).samples[0]
    assert sample.episode is not None and sample.episode.failure.startswith("template: ")
    assert "unknown role narrator" in sample.episode.failure and sample.length > 0


def test_the_rows_of_an_episode_have_a_budget_together() -> None:
    options = ("rollout.max_response_tokens=40", "rollout.max_prompt_tokens=60")
    roomy = Table(Counting, thinks, *options, **ANEW).play(samples=1, rows=1000).samples[0]
    used = sum(len(s.context) + s.end - s.start for s in roomy.segments)
    assert roomy.episode is not None and roomy.episode.ended == "done" and len(roomy.segments) == 3
    tight = Table(Counting, thinks, *options, **ANEW).play(samples=1, rows=used - 1).samples[0]
    assert tight.finish_reason == "length" and len(tight) == len(roomy) - 1, "the last turn is cut"
    assert [s.context.tolist() for s in tight.segments] == [s.context.tolist() for s in roomy.segments]
    none = Table(Counting, thinks, *options, **ANEW).play(samples=1).samples[0]
    assert none.episode is not None and none.episode.ended == "tokens" and len(none.segments) == 2


def test_budgets_of_turns_and_tokens_end_an_episode_without_fault() -> None:
    def wrong(text: str, request: Request) -> str:
        return "no idea"

    of_turns = Table(Counting, wrong).play().samples[0]
    assert of_turns.episode is not None
    assert (of_turns.episode.ended, of_turns.finish_reason, of_turns.episode.success) == ("turns", "length", False)
    assert [s.role for s in of_turns.spans][-1] == "assistant", "nothing is trained after the last answer"
    tokens = Table(Counting, wrong, "rollout.max_response_tokens=24").play().samples[0]
    assert tokens.episode is not None and (tokens.episode.ended, tokens.finish_reason) == ("tokens", "length")
    assert len(tokens) <= 24
    cut = Table(Counting, wrong, max_turn_tokens=2).play().samples[0]
    assert cut.episode is not None and cut.episode.ended == "turns"
    assert [s.end - s.start for s in cut.spans if s.role == "assistant"] == [2, 2, 2]


def test_the_last_turn_is_announced() -> None:
    seen: list[tuple[int, bool]] = []

    class Watching(Counting):
        def step(self, action: Action) -> Step:
            seen.append((action.turn, action.last))
            return super().step(action)

    Table(Watching, lambda *_: "no", max_turns=2).play(samples=1)
    assert seen == [(0, False), (1, True)]


def test_a_greedy_sample_and_an_evaluation_have_their_own_temperature_and_length() -> None:
    table = Table(Counting, counts)
    group = table.play(samples=1, greedy=True, temperature=0.5, max_response_tokens=20)
    assert group.greedy is not None and len(group.samples) == 1
    assert {r.temperature for r in table.asked if r.id.startswith("00000005:0:")} == {0.5}
    assert {r.temperature for r in table.asked if r.id.startswith("00000005:1:")} == {0.0}
    assert max(r.max_tokens for r in table.asked) == 20


class Flaky(Counting):
    broken: ClassVar[list[int]] = []

    def step(self, action: Action) -> Step:
        if action.turn == 1 and len(self.broken) < 1:
            self.broken.append(1)
            raise EnvironmentFailure("the server is away")
        return super().step(action)


def test_a_broken_episode_begins_again_with_the_same_seeds_and_tokens() -> None:
    Flaky.broken.clear()
    table = Table(Flaky, counts)
    again, undisturbed = table.play(samples=1).samples[0], Table(Counting, counts).play(samples=1).samples[0]
    assert again.token_ids.tolist() == undisturbed.token_ids.tolist() and again.spans == undisturbed.spans
    assert [r.seed for r in table.asked][:2] == [r.seed for r in table.asked][2:4]
    assert len({r.id for r in table.asked}) == len(table.asked)


def test_one_that_stays_broken_is_a_sample_that_says_so_and_the_others_go_on() -> None:
    class Broken(Counting):
        def step(self, action: Action) -> Step:
            if action.turn == 1:
                raise KeyError("abacus")
            return super().step(action)

    one = Table(Broken, counts, retries=2).play(samples=1)
    (sample,) = one.samples
    assert sample.episode is not None and sample.episode.ended == "failed"
    assert sample.episode.failure == "exception: KeyError: 'abacus'" and len(sample) > sample.length > 1

    class Nothing(Counting):
        def reset(self, task: Task, seed: int) -> str:
            raise EnvironmentFailure("no table is free")

    group = Table(Nothing, counts).play()
    for index, sample in enumerate(group.samples):
        assert sample.episode is not None and sample.episode.failure == "failure: no table is free"
        assert (sample.index, len(sample), sample.length, sample.text) == (index, 1, 0, "")
    assert group.prompt == PROMPT


def test_all_samples_of_a_group_must_read_the_same_opening() -> None:
    numbers = iter(range(9))

    class Moody(Counting):
        def reset(self, task: Task, seed: int) -> str:
            super().reset(task, seed)
            return f"Count on from {next(numbers)}."

    group = Table(Moody, counts).play()
    kinds = [sample.episode and sample.episode.failure.partition(":")[0] for sample in group.samples]
    assert kinds == ["", "openings_differ"]


class Long(Counting):
    def reset(self, task: Task, seed: int) -> str:
        return "count " * 2000


def test_long_observations_are_cut_and_long_openings_are_a_failure() -> None:
    class Talks(Counting):
        def step(self, action: Action) -> Step:
            return replace(super().step(action), observation="bla " * 2000)

    sample = Table(Talks, lambda *_: "no", max_observation_tokens=30).play(samples=1).samples[0]
    observed = [span for span in sample.spans if span.role == "user"]
    assert observed and all(span.end - span.start < 45 for span in observed)
    failed = Table(Long, counts).play(samples=1).samples[0]
    assert failed.episode is not None and "more than rollout.max_prompt_tokens=640" in failed.episode.failure


def test_half_a_character_is_a_question_mark() -> None:
    class Cuts(Counting):
        def reset(self, task: Task, seed: int) -> str:
            return super().reset(task, seed) + "\ud83d"

        def step(self, action: Action) -> Step:
            step = super().step(action)
            return replace(step, observation=f"\ud83d {step.observation}")

    group = Table(Cuts, counts).play(samples=1)
    (episode,) = (sample.episode for sample in group.samples)
    assert episode is not None and episode.success and group.prompt.messages[0].content.endswith(".?")
    assert episode.messages[1].content.startswith("? It was")


def step_returning(value: Any) -> type[Environment]:
    class Odd(Counting):
        def step(self, action: Action) -> Any:
            return value

    return Odd


@pytest.mark.parametrize(
    ("value", "failure"),
    [
        (None, "wrong_type: step() returned NoneType None, not a Step"),
        ("text", "wrong_type: step() returned str 'text', not a Step"),
        (Step("a", math.nan), "not_finite: reward of a Step is nan"),
        (Step("a", "1"), "wrong_type: reward of a Step is str '1', not a number"),  # type: ignore[arg-type]
        (Step("a", metrics={"x": math.inf}), "not_finite: x of a Step is inf"),
        (Step(3), "wrong_type: step() says int 3, not text, a Message or a list of Messages"),  # type: ignore[arg-type]
        (Step([Message("user", None)]), "wrong_type: step() says NoneType None, not text"),  # type: ignore[arg-type]
        (Step("a", state=4), "wrong_type: state of a Step is int 4, not text"),  # type: ignore[arg-type]
        (Step(), "wrong_type: step() neither ends the episode nor says anything to continue with"),
    ],
)
def test_what_a_step_may_not_be(value: Any, failure: str) -> None:
    sample = Table(step_returning(value), counts).play(samples=1).samples[0]
    assert sample.episode is not None and sample.episode.failure.startswith(failure)


def test_asynchronous_environments_have_deadlines_and_are_closed() -> None:
    closed: list[str] = []

    class Sleeper(Counting):
        async def step(self, action: Action) -> Step:
            await asyncio.sleep(30)
            return super().step(action)

        async def close(self) -> None:
            closed.append("yes")
            raise RuntimeError("close fails, too")

    sample = Table(Sleeper, counts, step_timeout_seconds=0.1).play(samples=1).samples[0]
    assert sample.episode is not None
    assert sample.episode.failure == "timeout: no answer within environment.step_timeout_seconds=0.1"
    assert closed == ["yes", "yes"], "of both tries"


def test_a_timeout_of_the_environments_own_is_an_exception() -> None:
    class Calls(Counting):
        async def step(self, action: Action) -> Step:
            raise TimeoutError("its server is slow")

    sample = Table(Calls, counts).play(samples=1).samples[0]
    assert sample.episode is not None and sample.episode.failure == "exception: TimeoutError: its server is slow"


def test_environments_are_closed_if_the_engine_ends() -> None:
    closed: list[int] = []

    class Closing(Counting):
        def close(self) -> None:
            closed.append(self.now)

    class Silent(Table):
        async def turn(self, request: Request) -> Response:
            self.asked.append(request)
            return await asyncio.get_running_loop().create_future()

    async def cancelled() -> None:
        table = Silent(Closing, counts)
        playing = asyncio.create_task(table.group(samples=3))
        while len(table.asked) < 3:
            await asyncio.sleep(0)
        playing.cancel()
        await asyncio.wait({playing})
        await asyncio.sleep(0.01)
        assert len(closed) == 3 and not table.host._open

    asyncio.run(cancelled())


def test_tasks_reach_the_environment_as_the_data_have_them() -> None:
    tasks: list[Task] = []

    class Reads(Counting):
        def reset(self, task: Task, seed: int) -> str:
            tasks.append(task)
            return super().reset(task, seed)

    Table(Reads, counts).play(samples=3)
    assert set(map(repr, tasks)) == {repr(Task("train-3", answer="4", columns={"start": 3}))}
