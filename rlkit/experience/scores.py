"""Check what a reward returned, sample by sample, and count failures by reason. Pure: no Ray, no reward.

There are two kinds of failure. Infrastructure: the reward's process hangs, dies or raises, and the pool retries
elsewhere. Data: this sample, or what the reward returned for it, is unusable, and a retry would not help.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import numpy as np

from rlkit.experience import Group, GroupScores, Score
from rlkit.experience.errors import UserError
from rlkit.experience.types import UNJUDGED, FloatArray, Sample

Area = Literal["accuracy", "reward"]
"""What the verifier's verdicts mean: right or wrong, or values of any size."""


class RewardFailed(UserError):
    """Raised if the reward fails too often to continue; the message names causes and counts."""


@dataclass(frozen=True)
class ScoreReport:
    samples: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    """Invalid samples by reason class (`timeout`, `crash`, `exception`, `wrong_length`, ...)."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """One full reason per class."""
    seconds: float = 0.0
    """Time spent scoring, summed over calls."""
    error: str = ""
    """Traceback if the backend raised (the report then has no groups)."""
    tracebacks: Mapping[str, str] = field(default_factory=dict)
    """Traces of samples for which a user's function raised, one for each exception and location in the code."""

    def __add__(self, other: ScoreReport) -> ScoreReport:
        return ScoreReport(
            samples=self.samples + other.samples,
            failures=Counter(self.failures) + Counter(other.failures),
            examples={**other.examples, **self.examples},
            seconds=self.seconds + other.seconds,
            error=self.error or other.error,
            tracebacks={**other.tracebacks, **self.tracebacks},
        )

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


def checked_scores(groups: Sequence[Group], result: object) -> list[GroupScores]:
    """Return a reward's scores of groups; anything that breaks the contract becomes an invalid score."""
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        reason = f"wrong_type: score() returned {_describe(result)}, not a list of GroupScores"
        return [invalid_scores(group, reason) for group in groups]
    if len(result) != len(groups):
        reason = f"wrong_length: score() returned {len(result)} results for {len(groups)} groups"
        return [invalid_scores(group, reason) for group in groups]
    return [_checked(group, scores) for group, scores in zip(groups, result, strict=True)]


def with_scores(groups: Iterable[Group], judged: Iterable[GroupScores]) -> list[Group]:
    """Return the groups with their scores. Raises ValueError if the numbers differ."""
    return [group.with_scores(scores) for group, scores in zip(groups, judged, strict=True)]


def invalid_scores(group: Group, reason: str) -> GroupScores:
    invalid = Score.invalid(reason)
    return GroupScores((invalid,) * len(group.samples), greedy=None if group.greedy is None else invalid)


_PART = re.compile(r"part ([^\s:]+):")


def kind_of(reason: str) -> str:
    """Return the class of a reason, such as `timeout`; for a part of a combined reward, `judge/timeout`."""
    kind, _, details = reason.partition(":")
    part = _PART.match(details.strip())
    return kind.strip() if part is None else f"{part.group(1)}/{kind.strip()}"


_RAISED = re.compile(r"^Traceback.*\n(?: .*\n)*[\w.]+", re.MULTILINE)
"""Matches an exception, and each that it was raised from, up to the message, which may differ in every sample."""


def report_on(judged: Iterable[GroupScores], seconds: float) -> ScoreReport:
    """Return the report on scored groups; greedy responses count, too."""
    samples = 0
    failures: Counter[str] = Counter()
    examples: dict[str, str] = {}
    tracebacks: dict[str, str] = {}
    for group in judged:
        scores = group.samples if group.greedy is None else (*group.samples, group.greedy)
        samples += len(scores)
        for score in scores:
            if not score.valid:
                kind = kind_of(score.reason)
                failures[kind] += 1
                examples.setdefault(kind, score.reason)
                if kind == "exception" and (raised := _RAISED.findall(score.trace)):
                    tracebacks.setdefault("\n".join(raised), score.trace)
    return ScoreReport(samples, dict(failures), examples, seconds, tracebacks=tracebacks)


def check_failures(report: ScoreReport, max_failed_share: float, reward: str) -> None:
    """Raise RewardFailed if more than `max_failed_share` (0 to 1) of a step's samples got no score."""
    if report.samples == 0 or report.failed <= max_failed_share * report.samples:
        return
    causes = [
        f"  {count} x {kind}, for example: {report.examples.get(kind, kind)}"
        for kind, count in sorted(report.failures.items(), key=lambda item: -item[1])
    ]
    raise RewardFailed(
        f"{report.failed} of {report.samples} samples ({report.failed / report.samples:.0%}) got no score from "
        f"{reward} in one step, more than reward.max_failed_share={max_failed_share:g} allows:\n"
        + "\n".join(causes)
        + "\nFix the cause, or raise reward.max_failed_share to train without these samples on purpose."
    )


def _checked(group: Group, scores: Any) -> GroupScores:
    if not isinstance(scores, GroupScores):
        return invalid_scores(group, f"wrong_type: {_describe(scores)} instead of GroupScores")
    if len(scores.samples) != len(group.samples):
        reason = f"wrong_length: {len(scores.samples)} scores for the {len(group.samples)} samples of group {group.id}"
        return invalid_scores(group, reason)
    members = set(range(len(group.samples)))
    for pair in scores.pairs:
        if pair.winner == pair.loser or not {pair.winner, pair.loser} <= members or not 0 <= pair.probability <= 1:
            return invalid_scores(group, f"wrong_pair: {_describe(pair)} in group {group.id}")
    checked = tuple(_check(score, len(sample)) for score, sample in zip(scores.samples, group.samples, strict=True))
    return GroupScores(checked, scores.pairs)


def _check(score: Any, tokens: int) -> Score:
    """Return the score with plain numbers (no tensors), or an invalid one that says how it breaks the contract."""
    if isinstance(score, float) and not math.isfinite(score):
        return Score.invalid(f"not_finite: the score is {score}")
    if not isinstance(score, Score):
        return Score.invalid(f"wrong_type: {_describe(score)} instead of a Score")
    if not isinstance(score.reason, str) or not isinstance(score.trace, str):
        return Score.invalid(
            f"wrong_type: reason and trace must be texts, not {_describe((score.reason, score.trace))}"
        )
    numbers = [*score.components.values(), *score.ensemble, *([] if score.value is None else [score.value])]
    for number in numbers:
        if not isinstance(number, Real):
            return Score.invalid(f"wrong_type: {_describe(number)} as value, component or member instead of a number")
    if score.token_rewards is not None and len(score.token_rewards) != tokens:
        return Score.invalid(f"wrong_length: {len(score.token_rewards)} token rewards for {tokens} tokens")
    if any(not 0 <= span.start < span.end <= tokens for span in score.span_rewards):
        return Score.invalid(f"wrong_span: a span reward lies outside the {tokens} tokens of the response")
    return replace(
        score,
        value=None if score.value is None else float(score.value),
        components={name: float(part) for name, part in score.components.items()},
        ensemble=tuple(float(member) for member in score.ensemble),
        token_rewards=None if score.token_rewards is None else np.asarray(score.token_rewards, dtype=np.float32),
    )


def _describe(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"


def total_reward(score: Score) -> float | None:
    """Return a sample's outcome reward, else the sum of its process rewards; None if invalid or not judged."""
    if not score.valid or score.reason == UNJUDGED:
        return None
    if score.value is not None:
        return score.value
    tokens = 0.0 if score.token_rewards is None else float(score.token_rewards.sum())
    return tokens + sum(span.value for span in score.span_rewards)


def rightness(score: Score) -> float | None:
    """Return 1 (right) or 0 (wrong) from a verifier's component `correct` or an environment's `success`; None if the
    score has neither."""
    return score.components.get("correct", score.components.get("success"))


def verdicts(groups: Sequence[Group]) -> tuple[Area, list[FloatArray]]:
    """Return the verifier's verdicts: per group [samples], NaN where a sample was not judged.

    They are `accuracy` (1 right, 0 wrong) if all judged samples have a component `correct` or `success`, or if any has
    `success`: an episode whose environment does not report success had none. Otherwise they are `reward`: the values.
    Raises RewardFailed for a sample with neither.
    """
    scores = [[score for _, score in group.scored()] for group in groups]
    judged = [score for own in scores for score in own if score.valid]
    graded = all(rightness(score) is not None for score in judged) or any("success" in s.components for s in judged)
    area: Area = "accuracy" if graded else "reward"
    return area, [np.array([_verdict(score, area) for score in own]) for own in scores]


def _verdict(score: Score, area: Area) -> float:
    if not score.valid:
        return math.nan
    verdict = (rightness(score) or 0.0) if area == "accuracy" else score.value
    if verdict is None:
        raise RewardFailed("the verifier gives no value for a whole response: verifier=NAME must be a reward that does")
    return verdict


def played(group: Group, least: Callable[[], int]) -> Group | None:
    """Return the group without the samples whose environment broke, which no reward judges, and without their earlier
    scores: unchanged if there are none, None if fewer than `least()` are left (called only if some broke)."""
    left = [place for place, sample in enumerate(group.samples) if not _broke(sample)]
    if len(left) == len(group.samples):
        return group
    if len(left) < least():
        return None
    earlier = None if group.scores is None else _scores_at(left, group.scores)
    return replace(group, samples=tuple(group.samples[place] for place in left), scores=earlier)


def _scores_at(places: Sequence[int], scores: GroupScores) -> GroupScores:
    """Return the scores of the samples at `places`, renumbered from 0; preferences that involve others are dropped."""
    new = {place: number for number, place in enumerate(places)}
    pairs = tuple(
        replace(pair, winner=new[pair.winner], loser=new[pair.loser])
        for pair in scores.pairs
        if pair.winner in new and pair.loser in new
    )
    return replace(scores, samples=tuple(scores.samples[place] for place in places), pairs=pairs)


def with_broken(scores: GroupScores | None, original: Group) -> GroupScores:
    """Undo `played` on a reward's scores: samples whose environment broke get invalid scores. If `scores` is None, too
    few were left for the reward to judge, and the others get invalid scores as well."""
    if scores is not None and len(scores.samples) == len(original.samples):
        return scores
    places = [i for i, sample in enumerate(original.samples) if not _broke(sample)]
    alone = Score.invalid("environment: broke for the other samples of the group, and too few are left to compare")
    own = GroupScores((alone,) * len(places)) if scores is None else scores
    judged = dict(zip(places, own.samples, strict=True))
    whole = tuple(judged.get(i) or Score.invalid(_broke(sample)) for i, sample in enumerate(original.samples))
    pairs = tuple(replace(pair, winner=places[pair.winner], loser=places[pair.loser]) for pair in own.pairs)
    return GroupScores(whole, pairs)


def _broke(sample: Sample) -> str:
    """Return why the environment broke; an empty text if it did not."""
    episode = sample.episode
    return f"environment: {episode.failure}" if episode is not None and episode.ended == "failed" else ""


def with_greedy(group: Group) -> Group:
    """Return the group with its greedy response and score appended as its last sample; unchanged if it has none."""
    if group.greedy is None:
        return group
    samples = (*group.samples, replace(group.greedy, index=len(group.samples)))
    scores = group.scores
    if scores is not None and scores.greedy is not None:
        scores = GroupScores((*scores.samples, scores.greedy), scores.pairs)
    return replace(group, samples=samples, scores=scores, greedy=None)


def without_greedy(scores: GroupScores, original: Group) -> GroupScores:
    """Undo `with_greedy` on a reward's scores; preferences that involve the greedy response are dropped."""
    if original.greedy is None:
        return scores
    count = len(original.samples)
    return replace(_scores_at(range(count), scores), greedy=scores.samples[count])
