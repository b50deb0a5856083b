"""Diagnostics that compare the run's reward with another judge of the same responses."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rlkit.diagnostics.base import Diagnostic, DiagnosticConfig, Findings, RunFacts, StepRecord, Windows
from rlkit.experience import Prompt, Score
from rlkit.experience.scores import total_reward

Float64 = NDArray[np.float64]
VERIFIER = "verifier"
CHANCE = 0.5


def both_scores(record: StepRecord, against: str = VERIFIER) -> Iterator[tuple[Prompt, Float64, Float64]]:
    """Yield per group its prompt, rewards [n], and the verifier's scores or a component of the reward [n], for the
    samples that have both."""
    groups = [*record.groups, *record.rejected]
    judges = groups if against != VERIFIER or record.judged is None else record.judged
    for group, judged in zip(groups, judges, strict=True):
        scores = zip(group.scored(), judged.scored(), strict=True)
        values = [(total_reward(score), _other(other, against)) for (_, score), (_, other) in scores]
        known = np.array([pair for pair in values if None not in pair], dtype=np.float64).reshape(-1, 2)
        yield group.prompt, known[:, 0], known[:, 1]


def _other(score: Score, against: str) -> float | None:
    """Return the score to compare with; None if it is unknown."""
    if not score.valid:
        return None
    return score.components.get("correct", score.value) if against == VERIFIER else score.components.get(against)


def nothing_to_compare(record: StepRecord) -> Findings:
    return Findings(
        warning="there is nothing to compare the reward with: without a held-out problem that the verifier can judge, "
        "no verifier is in use in this run"
    )


def compares_something(facts: RunFacts) -> Iterator[str]:
    if not facts.verified:
        yield (
            "there is no verifier to compare with: it is the reward itself (choose another with verifier=NAME), or "
            "judges no training answers (evaluation.training_answers)"
        )


def pair_accuracy(rewards: Float64, truth: Float64) -> tuple[float, int]:
    """Return (correctly ordered pairs, pairs) of responses [n] that differ in truth; equal rewards count half."""
    better = truth[:, None] > truth[None, :]
    ordered = np.sign(rewards[:, None] - rewards[None, :]) / 2 + 0.5
    return float(ordered[better].sum()), int(better.sum())


class RewardGap(Diagnostic):
    """How often the reward orders two responses as the verifier does, by set of prompts: a learned reward is right less
    often far from its training data (arXiv 2409.03650)."""

    class Config(DiagnosticConfig):
        kind: str = "reward_gap"
        column: str | None = None
        """Data column that names each prompt's set; null: all prompts are one set."""
        steps: int = Field(default=10, ge=1)
        """Number of steps whose pairs the accuracies cover."""
        max_gap: float = Field(default=0.1, gt=0, le=1)
        """Warn when the accuracies of two sets differ by more than this, or one is not above chance."""
        min_pairs: int = Field(default=100, ge=1)
        """Fewest pairs for a set to be compared."""

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(config, settings)
        self.history: deque[dict[str, tuple[float, int]]] = deque(maxlen=config.steps)
        self.quiet = 0

    @classmethod
    def objections(cls, config: Any, facts: RunFacts) -> Iterable[str]:
        yield from compares_something(facts)
        if config.column is not None and config.column not in facts.columns:
            known = ", ".join(sorted(facts.columns)) or "none"
            yield f"column={config.column}: the data have no such column (there are: {known})"

    def check(self, record: StepRecord) -> Findings:
        if record.judged is None:
            return nothing_to_compare(record)
        counts: dict[str, tuple[float, int]] = {}
        for prompt, rewards, truth in both_scores(record):
            name = "all" if self.config.column is None else str(prompt.columns.get(self.config.column))
            right, pairs = pair_accuracy(rewards, truth)
            before = counts.get(name, (0.0, 0))
            counts[name] = (before[0] + right, before[1] + pairs)
        self.history.append(counts)
        self.quiet -= 1
        sets = {name: self._window(name) for name in sorted({name for step in self.history for name in step})}
        table = [
            {"set": name, "pairs": pairs, "accuracy": right / pairs} for name, (right, pairs) in sets.items() if pairs
        ]
        right, pairs = (sum(column) for column in zip(*sets.values(), strict=True)) if sets else (0.0, 0)
        if not pairs:
            return Findings()
        scalars = {"reward_gap/accuracy": right / pairs}
        large = {name: r / n for name, (r, n) in sets.items() if n >= self.config.min_pairs}
        if len(large) > 1:
            scalars["reward_gap/gap"] = max(large.values()) - min(large.values())
        return Findings(scalars, table, self._warning(large))

    def _window(self, name: str) -> tuple[float, int]:
        counts = [step.get(name, (0.0, 0)) for step in self.history]
        return sum(right for right, _ in counts), sum(pairs for _, pairs in counts)

    def _warning(self, accuracies: Mapping[str, float]) -> str:
        if not accuracies or self.quiet > 0:
            return ""
        worst, best = (chosen(accuracies, key=lambda name: accuracies[name]) for chosen in (min, max))
        if accuracies[worst] > CHANCE and accuracies[best] - accuracies[worst] <= self.config.max_gap:
            return ""
        self.quiet = self.config.steps
        compared = f", and in {accuracies[best]:.0%} of those of {best}" if best != worst else ""
        return (
            f"the reward orders two responses as the verifier does in {accuracies[worst]:.0%} of the pairs of "
            f"{worst}{compared}. Train the reward on such prompts, or leave them out (diagnostics/reward_gap.jsonl)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "quiet": self.quiet}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history.extend(
            {name: (right, pairs) for name, (right, pairs) in step.items()} for step in state["history"]
        )
        self.quiet = state["quiet"]


def standardised(rewards: Sequence[Float64]) -> Float64:
    """Concatenate groups [n] minus their means, which no policy can change, scaled to length 1 (zeros stay)."""
    row = np.concatenate([group - group.mean() for group in rewards if len(group)] or [np.zeros(0)])
    length = float(np.linalg.norm(row))
    return row / length if length > 0 else row


def starc(first: Sequence[Float64], second: Sequence[Float64]) -> tuple[float, float]:
    """Return the distance (half the Euclidean one) and angle / pi of two standardised rewards, both from 0 to 1."""
    a, b = standardised(first), standardised(second)
    return float(np.linalg.norm(a - b)) / 2, float(np.arccos(np.clip(a @ b, -1.0, 1.0)) / np.pi)


def _components(record: StepRecord, against: str) -> str:
    if against == VERIFIER:
        return ""
    names = sorted({name for group in record.groups for _, score in group.scored() for name in score.components})
    return f" among its components ({', '.join(names) or 'there are none'})"


class Starc(Diagnostic):
    """STARC distance between the reward and another one on the step's responses (arXiv 2309.15257, section 3; our form
    for single responses): 0 if they agree up to a shift per group and a scale, 1 if one is the other negated."""

    UNRELATED = 0.5**0.5
    """Distance of orthogonal rewards."""

    class Config(DiagnosticConfig):
        kind: str = "starc"
        against: str = VERIFIER
        """verifier, or a component of the reward: `unshaped` (before `reward.shaping`) or the name of a part."""
        steps: int = Field(default=10, ge=1)
        """Steps per window. Warn when the rewards are unrelated (mean distance above 0.7) in two windows in a row."""

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(config, settings)
        self.windows = Windows(config.steps)

    @classmethod
    def objections(cls, config: Any, facts: RunFacts) -> Iterable[str]:
        if config.against == VERIFIER:
            yield from compares_something(facts)

    def check(self, record: StepRecord) -> Findings:
        against = self.config.against
        if against == VERIFIER and record.judged is None:
            return nothing_to_compare(record)
        compared = [(rewards, other) for _, rewards, other in both_scores(record, against) if len(rewards)]
        if not compared:
            return Findings(warning=f"no response has both a reward and {against}{_components(record, against)}")
        rewards, other = zip(*compared, strict=True)
        distance, angle = starc(rewards, other)
        scalars = {"starc/distance": distance, "starc/angle": angle}
        self.windows.add(scalars)
        return Findings(scalars, [{"against": against, "groups": len(compared), **scalars}], self._warning())

    def _warning(self) -> str:
        change = self.windows.change("starc/distance")
        if not self.windows.due or change is None or min(change) < self.UNRELATED:
            return ""
        self.windows.warned()
        return (
            f"the reward has nothing in common with {self.config.against} (mean distance {change[1]:.2f} over "
            f"{self.windows.steps} steps; 0.71 is chance): training optimises something else. Read samples.jsonl, and "
            "use another reward or shaping"
        )

    def state_dict(self) -> dict[str, Any]:
        return self.windows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.windows.load_state_dict(state)
