"""`reward=turn_judge`, `reward=subgoal_judge`: a language model judges the turns of episodes, one by one."""

from __future__ import annotations

import asyncio
import json
import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from rewards.base import RewardTraits
from rewards.judge.base import BaseJudge
from rewards.judge.master_keys import Probe
from rewards.judge.question import CannotJudge, Question, Verdict, conversation, fenced_chat
from rewards.services.answers import Unparsable, guided_decoding, json_object
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score
from rlkit.experience.types import SpanReward

PRINCIPLE = (
    "A good turn brings the user's task nearer to its end. A call is right in form and asks for what is still unknown; "
    "an answer follows from what was found and claims nothing else. Guesses, repetition, and asking for what is known "
    "are bad."
)
Asks = Sequence[tuple[Question, Sequence[int]]]
"""Questions, each with the turns that its verdict's values belong to."""


class EpisodeJudge(BaseJudge):
    """Process rewards from 0 to 1 for the assistant's turns, and no value."""

    class Config(BaseJudge.Config):
        answer_format: Literal["json_schema", "json_object"] = "json_schema"
        """Form of the verdict: json_schema (guided decoding), or json_object for servers without schema support."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        own = super().traits(config)
        return replace(own, judges_texts=False, environment=True, process_rewards=True, outcome_rewards=False)

    @abstractmethod
    def asks(self, prompt: Prompt, said: Sequence[Message], places: Sequence[int], empty: Collection[int]) -> Asks:
        """Return what to ask. `said`: the whole conversation; `places`: which of its messages are turns. Turns in
        `empty` earn nothing, whatever the verdict. Raise CannotJudge."""

    def questions(self, prompt: Prompt, responses: Sequence[str]) -> list[Question]:
        """Ask about each response as an episode of one turn, for the probe at the start."""
        alone = [(*prompt.messages, Message("assistant", response)) for response in responses]
        return [question for said in alone for question, _ in self.asks(prompt, said, [len(said) - 1], ())]

    async def _score_group(self, group: Group, deadline: float) -> GroupScores:
        scores = (self._score_episode(group.prompt, sample, deadline) for sample in group.samples)
        return GroupScores(tuple(await asyncio.gather(*scores)))

    async def _score_episode(self, prompt: Prompt, sample: Sample, deadline: float) -> Score:
        spans = sample.turns
        if sample.episode is None or not spans:
            return Score.invalid("no_episode: no environment played this response")
        said = [_with_calls(message) for message in (*prompt.messages, *sample.episode.messages)]
        places = [i for i, message in enumerate(said) if message.role == "assistant"][-len(spans) :]
        by_rule = [self._by_rule(said[place].content) for place in places]
        if unfit := next((score for score in by_rule if score is not None and not score.valid), None):
            return unfit
        empty = [turn for turn, score in enumerate(by_rule) if score is not None]
        try:
            asks = self.asks(prompt, said, places, empty)
        except CannotJudge as error:
            return Score.invalid(str(error))
        rewards, notes, unread = dict.fromkeys(empty, 0.0), list[str](), ""
        for (_, turns), (_, verdict) in zip(asks, await self._ask([ask for ask, _ in asks], deadline), strict=True):
            if isinstance(verdict, Verdict):
                rewards = dict(zip(turns, verdict.values, strict=True)) | rewards
                notes.append(verdict.reasoning)
            elif verdict.reason.startswith("unparsable"):
                unread = unread or verdict.reason
            else:
                return Score.invalid(verdict.reason)
        if not rewards:
            return Score.invalid(unread)
        return Score(
            value=None,
            span_rewards=tuple(SpanReward(spans[k].start, spans[k].end, rewards[k]) for k in sorted(rewards)),
            components={"judge": sum(rewards.values()) / len(rewards), "unread": float(len(spans) - len(rewards))},
            trace="\n".join(notes),
        )

    def _question(self, role: str, blocks: Sequence[tuple[str, str]], how: str, schema: dict[str, Any]) -> Any:
        """Return a Question's arguments except `responses` and `read`."""
        chat = fenced_chat(role, blocks, how, self.context.seed)
        strict = self.config.answer_format == "json_schema"
        fields = guided_decoding(schema) if strict else {"response_format": {"type": "json_object"}}
        return {"messages": chat, "instruction": how, "fields": fields, "kind": type(self).__name__}


class TurnJudge(EpisodeJudge):
    """A turn's points divided by those of a perfect turn; the judge gives both numbers (PPR, arXiv 2509.25598).

    A turn whose verdict cannot be read gets no process reward.
    """

    class Config(EpisodeJudge.Config):
        principle: str = PRINCIPLE
        """What makes a turn good, in words."""
        principle_column: str | None = None
        """Data column with each prompt's principle; if it is empty, `principle` applies."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        columns = () if config.principle_column is None else (config.principle_column,)
        return replace(super().traits(config), columns=columns)

    def asks(self, prompt: Prompt, said: Sequence[Message], places: Sequence[int], empty: Collection[int]) -> Asks:
        own = prompt.columns.get(self.config.principle_column or "") or self.config.principle
        if not isinstance(own, str):
            raise CannotJudge(f"no_principle: {self.config.principle_column} holds a {type(own).__name__}, not a text")
        role = f"You judge one turn of an assistant in a conversation, by this principle:\n{own}"
        asks = []
        for turn, place in enumerate(places):
            if turn not in empty:
                text = said[place].content
                blocks = [("CONVERSATION SO FAR", conversation(said[:place])), ("RESPONSE", text)]
                asks.append((Question((text,), read=_points, **self._question(role, blocks, POINTS, _POINTS)), [turn]))
        return asks


class SubgoalJudge(EpisodeJudge):
    """1 / (number of sub-goals) for each sub-goal, given once, at the turn that completes it by the verdict (CALM)."""

    class Config(EpisodeJudge.Config):
        subgoals_column: str = "subgoals"
        """Data column with a list of each prompt's sub-goals, in words."""

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return replace(super().traits(config), columns=(config.subgoals_column,))

    def asks(self, prompt: Prompt, said: Sequence[Message], places: Sequence[int], empty: Collection[int]) -> Asks:
        goals = prompt.columns.get(self.config.subgoals_column)
        if not isinstance(goals, list | tuple) or not goals or not all(isinstance(goal, str) for goal in goals):
            raise CannotJudge(f"no_subgoals: {self.config.subgoals_column} is not a list of texts")
        numbered, turn = [], 0
        for place, message in enumerate(said):
            turn += place in places
            name = f"TURN {turn}" if place in places else message.role
            numbered.append(Message(name, message.content))
        listed = "\n".join(f"{number}. {goal}" for number, goal in enumerate(goals, 1))
        blocks = [("SUB-GOALS", listed), ("RESPONSE", conversation(numbered))]
        role = "You say which turn of an assistant in a conversation completes which sub-goal of its task."
        how = SUBGOALS.format(count=len(goals), turns=len(places))
        read = partial(_shares, goals=len(goals), turns=len(places))
        texts = tuple(said[place].content for place in places)
        return [(Question(texts, read=read, **self._question(role, blocks, how, _SUBGOALS)), range(len(places)))]

    def probes(self) -> list[Probe]:
        columns = {self.config.subgoals_column: ["The user has the right answer."]}
        return [replace(probe, prompt=replace(probe.prompt, columns=columns)) for probe in super().probes()]


POINTS = (
    'Answer with one JSON object and nothing else: {"reasoning": "...", "points": 4, "of": 6}, where `of` is how many '
    "points a perfect turn would get at this place by the principle, and `points` how many of these the response gets."
)
_NUMBER = {"type": "number"}
_POINTS = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "points": _NUMBER, "of": _NUMBER},
    "required": ["reasoning", "points", "of"],
    "additionalProperties": False,
}
SUBGOALS = (
    'Answer with one JSON object and nothing else: {{"reasoning": "...", "turns": [2, null]}}, where `turns` has for '
    "each of the {count} sub-goals in their order the number of the turn, from 1 to {turns}, that completes it, and "
    "null if none does."
)
_SUBGOALS = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "turns": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
    },
    "required": ["reasoning", "turns"],
    "additionalProperties": False,
}


def _points(answer: str) -> Verdict:
    content = json_object(answer)
    points: Any = content.get("points")
    most: Any = content.get("of")
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in (points, most)):
        raise Unparsable("points and of are not two numbers")
    if not 0 <= points <= most < math.inf or most == 0:
        raise Unparsable(f"{points!r} points of {most!r} are no share")
    return Verdict((points / most,), str(content.get("reasoning", "")))


def _shares(answer: str, goals: int, turns: int) -> Verdict:
    """Return the share of the sub-goals that each turn completes."""
    content = json_object(answer)
    numbers = content.get("turns")
    if not isinstance(numbers, list) or len(numbers) != goals:
        raise Unparsable(f"turns is not a list of {goals}")
    if wrong := [n for n in numbers if n is not None and (type(n) is not int or not 1 <= n <= turns)]:
        raise Unparsable(f"{wrong[0]!r} is no turn from 1 to {turns}")
    shares = tuple(numbers.count(turn) / goals for turn in range(1, turns + 1))
    return Verdict(shares, str(content.get("reasoning", "")))


def _with_calls(message: Message) -> Message:
    calls = [json.dumps({"call": call.name, "arguments": dict(call.arguments)}) for call in message.calls]
    return Message(message.role, "\n".join(part for part in (message.content, *calls) if part))
