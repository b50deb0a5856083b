"""Trees of calls: every sampled token is in one row, behind what the engine saw, whoever was faster."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.data.rendering import ChatTemplate, load_tokenizer
from rlkit.environments.base import EnvironmentConfig
from rlkit.environments.tool import Tool
from rlkit.experience import Episode, Message, Prompt, Sample
from rlkit.models.folder import model_folder
from rlkit.rollout.conversation import Conversation, Limits, as_sample, opening_of
from rlkit.rollout.engine import stop_token_ids
from rlkit.rollout.rendering import Renderer
from rlkit.rollout.requests import Response
from rlkit.rollout.session import Answer, RefusedError, Session

FOLDER = str(model_folder("embedded:agent"))
TOKENIZER = load_tokenizer(FOLDER)
STOPS = stop_token_ids(FOLDER, TOKENIZER)
TEMPLATE = ChatTemplate(TOKENIZER)
ROOMY = Limits(200, 400, 100_000)
Row = tuple[tuple[int, ...], tuple[int, ...]]


class Played:
    """A session with an engine whose answers depend on prompt and number alone, as with a seed."""

    def __init__(self, limits: Limits = ROOMY, pauses: Sequence[int] = (), **options: Any) -> None:
        self.pauses, self.seen = list(pauses), list[Row]()
        self.open, self.most_open = 0, 0
        renderer = Renderer(TEMPLATE, (), STOPS, history=options.get("history", "append"))

        def of_tools(tools: Sequence[Tool]) -> Renderer:
            return Renderer(TEMPLATE, tools, STOPS) if tools else renderer

        own = EnvironmentConfig(**{"max_turns": 99, **options})
        self.session = Session(self.sample, of_tools, own, limits)
        self.calls = 0

    async def sample(self, prompt: list[int], again: int, most: int) -> Response:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        for _ in range(self.pauses.pop() if self.pauses else 0):
            await asyncio.sleep(0)
        self.open -= 1
        number = (sum(prompt) * 31 + again) % 1000
        ids = [*TOKENIZER.encode(str(number), add_special_tokens=False), STOPS[0]][:most]
        self.seen.append((tuple(prompt), tuple(ids)))
        finish = "stop" if ids[-1] == STOPS[0] else "length"
        return Response(
            "", np.array(ids, np.int32), -np.ones(len(ids), np.float32), finish, 0, np.full(len(ids), 5, np.int32)
        )  # type: ignore[arg-type]

    async def chat(self, *messages: Message, tools: Sequence[Tool] = (), most: int | None = None) -> Answer:
        self.calls += 1
        return await self.session.chat(str(self.calls).encode(), False, messages, tools, most)

    async def generate(self, ids: Sequence[int]) -> Answer:
        self.calls += 1
        return await self.session.generate(str(self.calls).encode(), False, ids, None)

    def conversations(self) -> list[Conversation]:
        return self.session.conversations()

    def rows(self) -> list[tuple[int, int]]:
        """Of each row: tokens that it stands behind, and its own turns."""
        return [(len(conversation.prompt_ids), conversation.turns) for conversation in self.conversations()]

    def sample_of_it(self) -> Sample:
        last = self.session.last()
        return as_sample(self.conversations(), 0, 1, Episode("done"), last=last)


def user(text: str) -> Message:
    return Message("user", text)


def trained(sample: Sample, prompt: tuple[int, ...]) -> Counter[Row]:
    """Each trained turn, behind all that is before it in its row."""
    turns: Counter[Row] = Counter()
    segments = sample.segments
    starts = [(s.start, s.end, tuple(s.context.tolist())) for s in segments] or [(0, len(sample), prompt)]
    for span in sample.spans:
        if span.role == "assistant":
            ((start, _, context),) = [row for row in starts if row[0] <= span.start < row[1]]
            ids = sample.token_ids.tolist()
            assert sample.trained[span.start : span.end].all()
            turns[(*context, *ids[start : span.start]), tuple(ids[span.start : span.end])] += 1
    assert sum(len(said) for (_, said), n in turns.items() for _ in range(n)) == sample.length
    return turns


@dataclass
class Call:
    before: int | None
    """The call whose answer it waits for and goes on from, by its index; None: a conversation of its own."""
    change: str
    """nothing; `edited`: an earlier message is another; `ids`: in token ids; `again`: not from the answer, another
    try of the same call."""


@st.composite
def agents(draw: st.DrawFn) -> list[Call]:
    calls: list[Call] = []
    for i in range(draw(st.integers(1, 8))):
        before = draw(st.none() | st.integers(0, i - 1)) if i else None
        change = "" if before is None else draw(st.sampled_from(["", "", "", "edited", "ids", "again"]))
        calls.append(Call(before, change))
    return calls


async def act(played: Played, calls: list[Call]) -> None:
    """All calls at once; each waits for the one that it goes on from."""
    answers: dict[int, asyncio.Task[tuple[list[Message], Answer]]] = {}

    async def call(i: int) -> tuple[list[Message], Answer]:
        before, change = calls[i].before, calls[i].change
        said = [user(f"{i}?")]
        if before is not None:
            earlier, answer = await answers[before]
            said = [*earlier, answer.message, *said]
            if change == "edited":
                said = [user(f"{i}!"), *said[1:]]
            elif change == "again":
                return earlier, await played.chat(*earlier)
            elif change == "ids":
                ids = [*answer.prompt_ids, *answer.response.token_ids.tolist()]
                return said, await played.generate([*ids, *TOKENIZER.encode(f"{i}", add_special_tokens=False)])
        return said, await played.chat(*said)

    for i in range(len(calls)):
        answers[i] = asyncio.create_task(call(i))
    await asyncio.gather(*answers.values())


@settings(deadline=None, max_examples=120)
@given(agents(), st.lists(st.integers(0, 12), max_size=8), st.lists(st.integers(0, 12), max_size=8))
def test_every_sampled_token_is_trained_once_and_nothing_depends_on_who_was_faster(
    calls: list[Call], pauses: list[int], others: list[int]
) -> None:
    samples = []
    for waits in (pauses, others):
        played = Played(pauses=waits)
        asyncio.run(act(played, calls))
        sample = played.sample_of_it()
        first = played.conversations()[0].prompt_ids
        assert trained(sample, first) == Counter(played.seen)
        assert sample.logprobs is not None and (sample.logprobs[sample.trained] == -1).all()
        assert len(played.seen) == len(calls) == sum(c.turns for c in played.conversations())
        samples.append(sample)
    one, other = samples
    assert one.token_ids.tolist() == other.token_ids.tolist() and one.spans == other.spans
    assert [(s.start, s.end, s.context.tolist()) for s in one.segments] == [
        (s.start, s.end, s.context.tolist()) for s in other.segments
    ]
    appended = [call for call in calls if call.before is not None and call.change in ("", "ids")]
    starts = len(calls) - len(appended)
    assert len(one.segments or (1,)) >= max(1, starts), "what begins anew is a row of its own"


def test_agents_side_by_side_and_who_goes_on() -> None:
    async def play(played: Played) -> None:
        opening = user("Plan it.")
        plan = await played.chat(opening)
        helpers = [[user(f"Do part {n}.")] for n in range(3)]

        async def help(said: list[Message]) -> Message:
            for _ in range(2):
                said += [(await played.chat(*said)).message, user("Sure?")]
            return said[-2]

        done = await asyncio.gather(*map(help, helpers))
        await played.chat(opening, plan.message, user(" ".join(message.content for message in done)))

    played = Played(pauses=[1, 5, 2, 9, 3, 3, 4, 4])
    asyncio.run(play(played))
    assert played.most_open == 3, "none waits for another"
    assert sorted(turns for _, turns in played.rows()) == [2, 2, 2, 2]
    assert played.session.policy_seconds > 0


def test_the_longest_beginning_is_continued_and_nothing_of_it_is_tokenised_again() -> None:
    async def play(played: Played) -> None:
        said, answers = [user("One?")], list[Answer]()
        for _ in range(3):
            answers.append(await played.chat(*said))
            said += [answers[-1].message, user("More?")]
        known = [*answers[1].prompt_ids, *answers[1].response.token_ids.tolist()]
        # Blanks are a client's doing.
        fork = await played.chat(said[0], Message("assistant", f" {said[1].content}\n"), *said[2:4], user("Less?"))
        assert fork.prompt_ids[: len(known)] == known
        # A message of the middle is another: rendered whole, as the template writes it.
        edited = [said[0], said[1], user("Else?"), said[3], user("So?")]
        assert (await played.chat(*edited)).prompt_ids == Renderer(TEMPLATE, (), STOPS).whole(edited)

    played = Played()
    asyncio.run(play(played))
    assert [turns for _, turns in played.rows()] == [3, 1, 1]


def test_other_tools_are_another_conversation() -> None:
    look = Tool("look", "Looks.", {"type": "object", "properties": {}})

    async def play(played: Played) -> None:
        answer = await played.chat(user("A?"))
        await played.chat(user("A?"), answer.message, user("B?"), tools=[look])

    played = Played()
    asyncio.run(play(played))
    assert [turns for _, turns in played.rows()] == [1, 1]


def test_rerendered_calls_go_on_where_their_tokens_do() -> None:
    async def play(played: Played) -> None:
        said = [user("One?")]
        for _ in range(3):
            said += [(await played.chat(*said)).message, user("More?")]
        await played.chat(said[0], Message("assistant", "another"), user("So?"))

    played = Played(history="rerender")
    asyncio.run(play(played))
    assert [turns for _, turns in played.rows()] == [3, 1]


def test_budgets_of_a_conversation_and_of_all_together() -> None:
    async def spend(played: Played) -> str:
        said = [user("One?")]
        while True:
            try:
                said += [(await played.chat(*said)).message, user("More and more and more?")]
            except RefusedError as refused:
                return refused.code + str(refused)

    async def many(played: Played) -> str:
        for n in itertools.count():
            try:
                await played.chat(user(f"Number {n}?"))
            except RefusedError as refused:
                return refused.code + str(refused)
        return ""

    long = Played(Limits(50, 60, 1000))
    said = asyncio.run(spend(long))
    assert said.startswith("context_length_exceeded") and "rollout.max_response_tokens" in said
    assert sum(len(row.prompt()) for row in long.conversations()) <= 50 + 60
    wide = Played(Limits(50, 60, 200))
    assert "learner.tokens_per_microbatch" in asyncio.run(many(wide)) and wide.session.spent == "tokens"
    used = sum(len(row.prompt()) for row in wide.conversations())
    assert 200 - 60 < used <= 200
    # What is being sampled counts with what it may have, and others wait: the bound holds whoever is faster.
    crowd = Played(Limits(50, 60, 200), pauses=[5] * 9)

    async def at_once(count: int) -> list[Any]:
        return await asyncio.gather(*(crowd.chat(user(f"{n}?")) for n in range(count)), return_exceptions=True)

    assert all(isinstance(answer, Answer) for answer in asyncio.run(at_once(7)))
    assert crowd.most_open == 3 and sum(len(row.prompt()) for row in crowd.conversations()) <= 200
    turns = Played(max_turns=2)
    with pytest.raises(RefusedError, match="turns are used up"):
        asyncio.run(many_turns(turns.chat))


async def many_turns(chat: Callable[..., Awaitable[Answer]]) -> None:
    for n in range(3):
        await chat(user(f"{n}?"))


def test_an_opening_that_is_too_long_and_later_ones_that_may_be_longer() -> None:
    async def first(played: Played) -> None:
        with pytest.raises(RefusedError, match=r"more than rollout\.max_prompt_tokens=20"):
            await played.chat(user("word " * 30))
        assert played.session.fault is not None

    async def later(played: Played) -> int:
        await played.chat(user("One?"))
        long = await played.chat(user("word " * 15))
        with pytest.raises(RefusedError, match="tokens are used up"):
            await played.chat(user("word " * 90))
        return len(long.prompt_ids)

    asyncio.run(first(Played(Limits(20, 100, 1000))))
    assert asyncio.run(later(Played(Limits(20, 100, 1000)))) > 20


def test_the_last_answer_is_the_one_after_which_nothing_was_asked() -> None:
    async def compacted(played: Played) -> str:
        said = [user("One?")]
        for _ in range(2):
            said += [(await played.chat(*said)).message, user("More?")]
        return (await played.chat(user("1?"))).message.content  # shorter than all before: its row is the first one

    played = Played()
    answer = asyncio.run(compacted(played))
    assert [turns for _, turns in played.rows()] == [1, 2]
    assert played.sample_of_it().text == answer != played.conversations()[-1].last()[0]


def test_what_a_group_began_with() -> None:
    task = Prompt("p", (user("Guess it."),), (1,))

    def begun(*openings: tuple[str, tuple[int, ...]]) -> list[Conversation]:
        return [Conversation(ids, 9, [user(text)]) for text, ids in openings]

    plain = begun(("Guess it.", (5, 6, 7)))
    helped = begun(("Help.", (4,)), ("You: Guess it.", (5, 6, 7)))
    assert opening_of(task, [[], []]) is task
    assert opening_of(task, [plain, helped]).token_ids == (5, 6, 7), "what they share"
    assert opening_of(task, [[], helped]).token_ids == (5, 6, 7), "what holds the task"
    assert opening_of(task, [helped, begun(("Guess it. At 10:31", (8,)))]).token_ids == (5, 6, 7), "else of the first"
    assert opening_of(task, [begun(("x", (3, 3)), ("y", (2,)))]).token_ids == (2,), "else the shortest"
    assert opening_of(task, [helped, plain]).messages == (user("You: Guess it."),)


def test_samples_of_a_group_that_began_otherwise_are_behind_their_own_opening() -> None:
    conversation = Conversation((5, 6), 9, [user("now")])
    conversation.sampled(
        Response("", np.array([7], np.int32), np.zeros(1, np.float32), "stop", 0, np.zeros(1, np.int32)), "7"
    )
    assert as_sample([conversation], 0, 0, Episode("done"), (5, 6)).segments == ()
    (segment,) = as_sample([conversation], 0, 0, Episode("done"), (5, 5)).segments
    assert (segment.context.tolist(), segment.messages, segment.end) == ([5, 6], (user("now"),), 1)
