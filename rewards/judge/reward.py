"""`reward=judge`: a language model behind an OpenAI-compatible endpoint judges responses."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rewards.judge.master_keys import trivial
from rewards.judge.prompts import PRINCIPLE, Against, AnswerFormat, Findings, Judged, Material, Mode, Rules, judge_texts
from rlkit.experience import Group, GroupScores, PreferencePair, Score

if TYPE_CHECKING:
    from rewards.judge.asking import Judge

log = logging.getLogger(__name__)

SHARE_OF_DEADLINE = 0.8
"""Of the scoring call's time for the judge; then what has no verdict is invalid, and the worker is not killed."""
PAIRWISE_ONLY = ("against", "neighbours", "swap")
RESERVED_FIELDS = ("messages", "model", "stream", "n", "response_format")


class JudgeReward(Reward):
    """Values from 0 (worst) to 1 (best). A response without a verdict is invalid, never 0.

    A response without content (see `guard`) is 0 by rule, without a call; its component `guard` is 1.
    """

    class Config(RewardConfig):
        """Options of the judge."""

        base_url: str
        """The endpoint up to and without `/chat/completions`, like `http://127.0.0.1:8000/v1`."""
        model: str
        """Name of the model there."""
        api_key_variable: str | None = None
        """Name of the environment variable that holds the key. The key itself is never in a configuration."""
        mode: Mode = "pointwise"
        """pointwise: a score for each response; pairwise: share of wins; listwise: the whole group in one call."""
        principle: str = PRINCIPLE
        """What makes a response good, in words: the rubric."""
        principle_column: str | None = None
        """Data column with a principle of the prompt's own; where it is empty, `principle` holds."""
        reference: Literal["never", "if_given", "required"] = "if_given"
        """Whether the judge sees the prompt's first reference, or its gold answer where there is none."""
        low: float = 1.0
        """pointwise, listwise: the worst score on the judge's scale."""
        high: float = 10.0
        """pointwise, listwise: the best score on the judge's scale."""
        against: Against = "group"
        """pairwise: opponents are the other responses of the group, or the prompt's first reference."""
        neighbours: int | None = Field(default=None, ge=1)
        """pairwise in the group: each response meets the next so many in a shuffled ring, hence twice as many
        opponents; null: everyone meets everyone."""
        swap: bool = True
        """pairwise: ask both orders, so that a judge's liking for the first or second place cancels out."""
        answer_format: AnswerFormat = "json_schema"
        """How the verdict is asked for: json_schema (guided decoding), json_object, or text (its last line)."""
        reasons: bool = True
        """Ask for reasons before the verdict. Off: cheaper; for judges that think by themselves before they answer."""
        temperature: float = Field(default=0.0, ge=0)
        """Of the judge's sampling."""
        max_answer_tokens: int = Field(default=1024, ge=1)
        """Longest answer of the judge, its reasoning included."""
        request_fields: dict[str, Any] = Field(default={})
        """Further fields of the request; null removes one (`{max_tokens: null, max_completion_tokens: 1024}`)."""
        max_characters: int = Field(default=32768, ge=1)
        """Longer responses are invalid."""
        max_concurrent: int = Field(default=16, ge=1)
        """Calls of one worker at a time."""
        call_timeout_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
        """Deadline of one call."""
        attempts: int = Field(default=4, ge=1)
        """Tries of one call after time-outs, lost connections and answers 408, 429 and 5xx."""
        max_reasks: int = Field(default=2, ge=0)
        """How often the judge is asked again after an answer that cannot be read; then the sample is invalid."""
        max_calls: int | None = Field(default=None, ge=1)
        """Calls of a run, dealt out evenly to the workers. Then samples are invalid (`budget`) and the run stops by
        `max_failed_share`."""
        max_tokens: int | None = Field(default=None, ge=1)
        """The same for tokens, as the server counts them (prompt and answer)."""
        cache_size: int = Field(default=65536, ge=1)
        """Verdicts remembered in memory, by content."""
        cache_file: str | None = None
        """SQLite file with all verdicts, shared by workers and later runs; null: memory only."""
        guard: bool = True
        """Reject responses without content by rule: they fool judges."""
        min_alphanumerics: int = Field(default=1, ge=1)
        """The guard rejects responses with fewer letters and digits."""
        probe: Literal["refuse", "warn", "off"] = "refuse"
        """At the start, send responses without content (and right ones) to the judge; refuse to start if it accepts
        the former or not the latter, or only warn. off: one question, to see that it answers."""
        max_false_positive_rate: float = Field(default=0.0, ge=0, le=1)
        """Share of the probe's questions on which one such response may be accepted."""

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
            unused = [] if self.mode == "pairwise" else list(PAIRWISE_ONLY)
            if self.mode == "pairwise":
                unused += ["low", "high", *(["neighbours"] if self.against == "reference" else [])]
            unused += [] if self.guard else ["min_alphanumerics"]
            unused += [] if self.probe != "off" else ["max_false_positive_rate"]
            for name in unused:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect here: see mode, against, guard and probe")
            if self.low >= self.high:
                raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
            if self.mode == "pairwise" and self.against == "reference" and self.reference == "never":
                raise ValueError("against=reference needs a reference: reference=never contradicts it")
            for limit in (self.max_calls, self.max_tokens):
                if limit is not None and (limit < self.workers or self.max_failed_share == 1):
                    raise ValueError(
                        "a budget needs max_failed_share below 1, which stops the run, and a share for every worker"
                    )
            return self

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        shared = ("mode", "low", "high", "against", "neighbours", "swap", "reasons")
        self._rules = Rules(**{name: getattr(config, name) for name in shared}, seed=context.seed)
        self._runner: asyncio.Runner | None = None
        self._judge: Judge | None = None
        self._close_judge: Any = None

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """A reference where one is required; the column with principles. The judge is a server."""
        required = config.reference == "required" or (config.mode == "pairwise" and config.against == "reference")
        columns = () if config.principle_column is None else (config.principle_column,)
        compared = config.mode == "pairwise" and config.against == "group"
        return RewardTraits(
            references=required,
            columns=columns,
            samples=2 if compared else 1,
            judges_texts=config.mode == "pointwise" or (config.mode == "pairwise" and config.against == "reference"),
            uses_gpu=False,
        )

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """Whether the key is there."""
        name = config.api_key_variable
        if name is not None and not os.environ.get(name):
            return [f"reward.api_key_variable={name}: there is no such environment variable; export {name}=..."]
        return []

    def start(self) -> None:
        """Connect and probe. Raises JudgeError with the cause and the remedy."""
        from rewards.judge.asking import connect, introduce  # httpx and tenacity load only where a reward runs

        self._runner = asyncio.Runner()
        self._judge, self._close_judge = self._runner.run(connect(self.config, self.context))
        warning = self._runner.run(introduce(self._judge, self.config, self._rules))
        if warning:
            log.warning("%s", warning)

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Judge every group; all groups side by side."""
        if self._runner is None:
            raise RuntimeError("JudgeReward.start() was not called, or failed")
        return self._runner.run(self._score(groups))

    def close(self) -> None:
        """Close connections and the cache."""
        if self._runner is not None:
            if self._close_judge is not None:
                self._runner.run(self._close_judge())
            self._runner.close()
            self._runner = self._judge = self._close_judge = None

    async def _score(self, groups: Sequence[Group]) -> list[GroupScores]:
        deadline = time.monotonic() + SHARE_OF_DEADLINE * self.config.timeout_seconds
        return list(await asyncio.gather(*(self._score_group(group, deadline) for group in groups)))

    async def _score_group(self, group: Group, deadline: float) -> GroupScores:
        assert self._judge is not None
        material = self._material(group)
        if isinstance(material, str):
            return GroupScores((Score.invalid(material),) * len(group.samples))
        texts = [sample.text for sample in group.samples]
        decided = {text: found for text in texts if (found := self._by_rule(text)) is not None}
        open_texts = list(dict.fromkeys(text for text in texts if text not in decided))
        findings = Findings({}, {})
        if open_texts:
            findings = await judge_texts(self._judge, self._rules, material, open_texts, deadline)
        if self._rules.mode == "pairwise" and self._rules.against == "group":
            return _win_rates(texts, decided, findings)
        return GroupScores(tuple(decided.get(text) or _score(findings.judged[text]) for text in texts))

    def _by_rule(self, text: str) -> Score | None:
        """The score of a response that no judge needs to see."""
        if len(text) > self.config.max_characters:
            return Score.invalid(f"too_long: {len(text)} characters, more than {self.config.max_characters}")
        why = trivial(text, self.config.min_alphanumerics) if self.config.guard else ""
        return Score(0.0, components={"judge": 0.0, "guard": 1.0}, trace=f"rejected by rule: {why}") if why else None

    def _material(self, group: Group) -> Material | str:
        """What the group is judged by, or why it cannot be."""
        config, prompt = self.config, group.prompt
        principle = config.principle
        if config.principle_column is not None:
            own = prompt.columns.get(config.principle_column)
            if own is not None and not isinstance(own, str):
                return f"no_principle: {config.principle_column} holds a {type(own).__name__}, not a text"
            principle = own or principle
        reference = prompt.references[0] if prompt.references else prompt.answer
        if self.traits(config).references and not prompt.references:
            return "no_reference: the prompt has no reference answer"
        return Material(principle, prompt.messages, None if config.reference == "never" else reference)


def _score(judged: Judged) -> Score:
    if judged.value is None:
        return Score.invalid(judged.note)
    return Score(judged.value, components={"judge": judged.value, "guard": 0.0}, trace=judged.note)


def _win_rates(texts: Sequence[str], decided: Mapping[str, Score], findings: Findings) -> GroupScores:
    """Scores and preferences of a group whose responses were compared with each other.

    A rejected response loses against every other; equal responses share the win.
    """
    shares = {**findings.wins, **{(second, first): 1 - share for (first, second), share in findings.wins.items()}}
    rejected = {text for text, score in decided.items() if score.valid}
    scores, pairs = [], []
    for place, text in enumerate(texts):
        if text in decided:
            scores.append(decided[text])
            continue
        met = [other for i, other in enumerate(texts) if i != place]
        won = [_share(text, other, shares, rejected) for other in met]
        known = [share for share in won if share is not None]
        failed = findings.judged[text]
        if failed.value is None and failed.note:  # most of its comparisons have no verdict
            scores.append(Score.invalid(failed.note))
        elif not known:
            scores.append(Score.invalid("no_opponent: there is no other response to compare it with"))
        else:
            scores.append(_score(Judged(sum(known) / len(known), failed.note)))
    for i, first in enumerate(texts):
        for j, second in enumerate(texts[i + 1 :], start=i + 1):
            share = _share(first, second, shares, rejected) if scores[i].valid and scores[j].valid else None
            if share is not None and share != 0.5:
                pairs.append(PreferencePair(i, j, share) if share > 0.5 else PreferencePair(j, i, 1 - share))
    return GroupScores(tuple(scores), tuple(pairs))


def _share(first: str, second: str, shares: Mapping[tuple[str, str], float], rejected: set[str]) -> float | None:
    """First's share of the win over second; None if they were not compared."""
    if first == second or {first, second} <= rejected:
        return 0.5
    if second in rejected:
        return 1.0
    return 0.0 if first in rejected else shares.get((first, second))
