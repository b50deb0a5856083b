"""Base class of the rewards that ask a language model; docs/rewards/judge.md has an example of a subclass."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rewards.judge.master_keys import QUESTIONS, Probe, complaint, trivial
from rewards.judge.question import CannotJudge, NoVerdict, Question, Verdict
from rlkit.config.reach import nobody_at
from rlkit.experience import Group, GroupScores, Message, Prompt, Score, UserError
from rlkit.experience.section import Deadline

if TYPE_CHECKING:
    from rewards.judge.asking import Judge

log = logging.getLogger(__name__)

SHARE_OF_DEADLINE = 0.8
"""Share of a scoring call's deadline after which samples without a verdict become invalid."""
RESERVED_FIELDS = ("messages", "model", "stream", "n", "response_format")
ACCEPTED = 0.5
"""The judge accepts a response from this value, or share of the win, upwards."""

Asked = Sequence[tuple[Question, Verdict | NoVerdict]]


class JudgeError(UserError): ...


class BaseJudge(Reward):
    """Values from 0 (worst) to 1 (best). A response without a verdict is invalid, never 0.

    The guard gives a response without content the score 0 without a call; the component `guard` is then 1.
    """

    class Config(RewardConfig):
        base_url: str
        """Base URL without `/chat/completions`, like `http://127.0.0.1:8000/v1`."""
        model: str
        """The judge's model name at the endpoint."""
        api_key_variable: str | None = None
        """Environment variable that holds the API key."""
        temperature: float = Field(default=0.0, ge=0)
        """Sampling temperature of the judge."""
        max_answer_tokens: int = Field(default=1024, ge=1)
        """Longest answer of the judge, including its reasoning."""
        request_fields: dict[str, Any] = Field(default={})
        """Extra fields of the request; null removes one (`{max_tokens: null, max_completion_tokens: 1024}`)."""
        max_characters: int = Field(default=32768, ge=1)
        """Longer responses are invalid."""
        max_concurrent: int = Field(default=16, ge=1)
        """Concurrent calls per worker."""
        call_timeout_seconds: Deadline = 60.0
        """Deadline of one call."""
        attempts: int = Field(default=4, ge=1)
        """Tries per call after time-outs, lost connections and HTTP 408, 425, 429 and 5xx."""
        max_reasks: int = Field(default=2, ge=0)
        """How often the judge is asked again after an unreadable answer; after that the sample is invalid."""
        max_calls: int | None = Field(default=None, ge=1)
        """Calls per run, divided evenly among the workers; samples beyond the limit are invalid (`budget`)."""
        max_tokens: int | None = Field(default=None, ge=1)
        """The same for tokens (prompt and answer), as the server counts them."""
        cache_size: int = Field(default=65536, ge=1)
        """Verdicts kept in memory, keyed by content."""
        cache_file: str | None = None
        """SQLite file with all verdicts, shared between workers and with later runs; null: memory only."""
        guard: bool = True
        """Reject responses without content by a rule, because they can fool judges."""
        min_alphanumerics: int = Field(default=1, ge=1)
        """The guard rejects responses with fewer letters and digits than this."""
        probe: Literal["refuse", "warn", "off"] = "refuse"
        """At the start, send the judge responses without content as well as right ones. refuse: do not start if it
        accepts the former or rejects the latter; warn: only warn; off: only ask one question."""
        max_false_positive_rate: float = Field(default=0.0, ge=0, le=1)
        """Share of the probe's questions on which the judge may accept a response without content."""

        @field_validator("base_url")
        @classmethod
        def _is_http(cls, value: str) -> str:
            if not value.startswith(("http://", "https://")):
                raise ValueError("must begin with http:// or https://")
            if value.rstrip("/").endswith("/chat/completions"):
                raise ValueError("ends before /chat/completions")
            return value.rstrip("/")

        @field_validator("request_fields")
        @classmethod
        def _are_free(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
            taken = sorted(set(value) & set(RESERVED_FIELDS))
            if taken:
                raise ValueError(f"{', '.join(taken)}: set by rlkit itself")
            return value

        @model_validator(mode="after")
        def _options_act(self) -> Self:
            for name in self.unused():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect here: see mode, against, guard and probe")
            for limit in (self.max_calls, self.max_tokens):
                if limit is not None and (limit < self.workers or self.max_failed_share == 1):
                    raise ValueError(
                        "a budget needs max_failed_share below 1, which stops the run, and a share for every worker"
                    )
            return self

        def unused(self) -> list[str]:
            """Return the fields that have no effect and so must keep their defaults."""
            return [
                *([] if self.guard else ["min_alphanumerics"]),
                *([] if self.probe != "off" else ["max_false_positive_rate"]),
            ]

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._runner: asyncio.Runner | None = None
        self._judge: Judge | None = None

    @abstractmethod
    def questions(self, prompt: Prompt, responses: Sequence[str]) -> Sequence[Question]:
        """Return what to ask about distinct responses (possibly nothing).

        Raise CannotJudge if the prompt lacks what the judge needs; its samples are then invalid.
        """

    def combine(self, texts: Sequence[str], decided: Mapping[str, Score], asked: Asked) -> GroupScores:
        """Combine verdicts into scores; `decided` maps texts to scores that a rule gave."""
        scores = {**mean_scores(asked), **decided}
        missing = Score.invalid("no_question: nothing was asked about this response")
        return GroupScores(tuple(scores.get(text, missing) for text in texts))

    def probes(self) -> Sequence[Probe]:
        """Return right responses and some without content."""
        return [
            Probe(Prompt(f"probe-{i}", (Message("user", question),), (), (reference,), reference), right)
            for i, (question, reference, right) in enumerate(QUESTIONS)
        ]

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        return RewardTraits(uses_gpu=False)

    @classmethod
    def check(cls, config: Any) -> list[str]:
        name, problem = config.api_key_variable, nobody_at(config.base_url)
        messages = []
        if name is not None and not os.environ.get(name):
            messages.append(f"reward.api_key_variable={name}: there is no such environment variable; export {name}=...")
        if problem:
            messages.append(f"reward.base_url={config.base_url}: no judge answers there ({problem}); start it")
        return messages

    def start(self) -> None:
        self._judge = _connect(self.config)
        self._runner = asyncio.Runner()
        warning = self._runner.run(self._introduce())
        if warning:
            log.warning("%s", warning)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        if self._runner is None:
            raise RuntimeError(f"{type(self).__name__}.start() was not called, or failed")
        deadline = time.monotonic() + SHARE_OF_DEADLINE * self.config.timeout_seconds
        return self._runner.run(self._score(groups, deadline))

    def close(self) -> None:
        if self._runner is not None:
            if self._judge is not None:
                self._runner.run(self._judge.close())
            self._runner.close()
            self._runner = self._judge = None

    async def _score(self, groups: Sequence[Group], deadline: float) -> list[GroupScores]:
        return list(await asyncio.gather(*(self._score_group(group, deadline) for group in groups)))

    async def _score_group(self, group: Group, deadline: float) -> GroupScores:
        texts = [sample.text for sample in group.samples]
        decided = {text: score for text in texts if (score := self._by_rule(text)) is not None}
        try:
            return await self._judge_group(group.prompt, texts, decided, deadline)
        except CannotJudge as error:
            return GroupScores((Score.invalid(str(error)),) * len(texts))

    async def _judge_group(
        self, prompt: Prompt, texts: Sequence[str], decided: Mapping[str, Score], deadline: float
    ) -> GroupScores:
        questions = self.questions(prompt, [text for text in dict.fromkeys(texts) if text not in decided])
        return self.combine(texts, decided, await self._ask(questions, deadline))

    async def _ask(self, questions: Sequence[Question], deadline: float) -> Asked:
        assert self._judge is not None
        verdicts = await asyncio.gather(*(self._judge.ask(question, deadline) for question in questions))
        return list(zip(questions, verdicts, strict=True))

    def _by_rule(self, text: str) -> Score | None:
        if len(text) > self.config.max_characters:
            return Score.invalid(f"too_long: {len(text)} characters, more than {self.config.max_characters}")
        why = trivial(text, self.config.min_alphanumerics) if self.config.guard else ""
        return Score(0.0, components={"judge": 0.0, "guard": 1.0}, trace=f"rejected by rule: {why}") if why else None

    async def _introduce(self) -> str:
        """Return a warning or "", or raise JudgeError."""
        config, probes = self.config, self.probes()
        deadline = time.monotonic() + config.timeout_seconds
        who = f"the judge {config.model} at {config.base_url}"
        outcomes: list[tuple[Score, ...]] = []
        try:
            if config.probe == "off":
                right = list(dict.fromkeys(probe.right for probe in probes))
                asked = await self._ask(self.questions(probes[0].prompt, right[:2])[:1], deadline)
                reasons = [verdict.reason for _, verdict in asked if isinstance(verdict, NoVerdict)]
            else:
                judging = (
                    self._judge_group(probe.prompt, (probe.right, *probe.rejects), {}, deadline) for probe in probes
                )
                outcomes = [scores.samples for scores in await asyncio.gather(*judging)]
                reasons = [score.reason for scores in outcomes for score in scores if not score.valid]
        except CannotJudge as error:
            reasons = [str(error)]
        if reasons:
            raise JudgeError(f"{who} cannot be used: {reasons[0]}")
        accepted = [[score.value is not None and score.value >= ACCEPTED for score in scores] for scores in outcomes]
        wrong = complaint(probes, accepted, config.max_false_positive_rate) if accepted else ""
        if wrong and config.probe == "refuse":
            raise JudgeError(
                f"{who} failed the probe: {wrong}; choose another judge, make reward.principle more explicit, or "
                "continue with reward.probe=warn"
            )
        return f"{who}: {wrong}" if wrong else ""


def judge_score(value: float, trace: str) -> Score:
    return Score(value, components={"judge": value, "guard": 0.0}, trace=trace)


def mean_scores(asked: Asked) -> dict[str, Score]:
    """Map each text to its mean value; invalid if any of its questions has no verdict."""
    verdicts: dict[str, list[tuple[int, Verdict | NoVerdict]]] = {}
    for question, verdict in asked:
        for index, text in enumerate(question.responses):
            verdicts.setdefault(text, []).append((index, verdict))
    scores = {}
    for text, about in verdicts.items():
        failed = [verdict.reason for _, verdict in about if isinstance(verdict, NoVerdict)]
        known = [(verdict.values[index], verdict.reasoning) for index, verdict in about if isinstance(verdict, Verdict)]
        mean = sum(value for value, _ in known) / max(1, len(known))
        scores[text] = Score.invalid(failed[0]) if failed else judge_score(mean, "\n".join(note for _, note in known))
    return scores


def _connect(config: Any) -> Judge:
    from rewards.judge.asking import Judge, VerdictCache  # httpx and tenacity load only where a reward runs
    from rewards.services.chat import Budget, ChatClient, Endpoint
    from rewards.services.http import Limits

    limits = Limits(
        attempts=config.attempts,
        try_seconds=config.call_timeout_seconds,
        concurrent=config.max_concurrent,
        longest_retry_after=math.inf,
    )
    key = os.environ.get(config.api_key_variable) if config.api_key_variable else None
    fields = {"temperature": config.temperature, "max_tokens": config.max_answer_tokens, **config.request_fields}
    endpoint = Endpoint(config.base_url, config.model, key, fields, limits)
    max_calls, max_tokens = (n and n // config.workers for n in (config.max_calls, config.max_tokens))
    cache = VerdictCache(config.cache_size, None if config.cache_file is None else Path(config.cache_file).expanduser())
    return Judge(ChatClient(endpoint, Budget(max_calls, max_tokens)), cache, config.max_reasks)
