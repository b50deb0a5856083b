"""IGPO: a turn's reward is what it adds to the policy's belief in the right answer (arXiv 2510.14967).

Let p_k be the policy's geometric mean probability of the gold answer's tokens, measured before turn k (that is, after
everything that earlier turns and the environment said). Then

    r_k = p_(k+1) - p_k,    and the outcome on the last turn, after which nothing is measured.

The probabilities are those of the policy before the update, from a separate pass; no gradient flows through r. `credit`
sets how turns are then compared: turn_discounted, as published, loo or episode_plus_step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Literal

import numpy as np
from pydantic import Field

from algorithms.base import Advantages, AlgorithmNeeds, Experience, Pass, Render
from algorithms.functional.advantages import Float64
from algorithms.step_credit import StepCredit
from rlkit.experience import Group, Sample, Score, Span
from rlkit.experience.types import SpanReward

ANSWER = "answer"
"""Name of the pass."""


class IGPO(StepCredit):
    class Config(StepCredit.Config):
        credit: Literal["turn_discounted", "loo", "episode_plus_step"] = "turn_discounted"
        samples_per_prompt: int = Field(default=16, ge=1)
        gain: Literal["probability", "log_probability"] = "probability"
        """The quantity whose increase is a turn's reward; log_probability goes with a process_coefficient of 0.05 to
        0.2."""
        lead_in: str = ""
        """Text put before the answer when its likelihood is measured, as the policy writes answers: `<answer>`,
        `\\boxed{`. Special tokens in it are encoded as such."""

    def needs(self) -> AlgorithmNeeds:
        passes = {ANSWER: Pass(other_prompts=True)}
        return replace(super().needs(), process_rewards=False, answer=True, turns=True, passes=passes)

    def groups_for(self, name: str, groups: Sequence[Group], render: Render) -> list[Group]:
        """Return a group with one answer for each point of `_asked`."""
        return [question for group in groups for question in self._questions(group, render)]

    def _questions(self, group: Group, render: Render) -> Iterator[Group]:
        assert group.prompt.answer
        before, whole = render(self.config.lead_in), render(self.config.lead_in + group.prompt.answer)
        # A token that spans both belongs to the answer.
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))
        ids = np.array(whole[shared:], dtype=np.int32)
        answer = Sample(0, ids, None, group.prompt.answer, "stop", (0, 0), seed=0)
        for number, said in enumerate(_asked(group)):
            behind = (*group.prompt.token_ids, *said, *whole[:shared])
            yield Group(f"{group.id}-{number}", replace(group.prompt, token_ids=behind), (answer,), step=group.step)

    def credit(self, experience: Experience) -> Advantages:
        rows = iter(experience.logprobs[ANSWER])
        groups, known, gained = [], list[float](), list[float]()
        for group in experience.groups:
            asked = [float(np.mean(next(rows), dtype=np.float64)) for _ in _asked(group)]
            beliefs = iter(asked if self.config.gain == "log_probability" else np.exp(asked).tolist())
            first, scores = next(beliefs), []
            for sample, score in group.scored():
                turns = sample.turns
                belief = np.array([first, *(next(beliefs) for _ in turns[1:])])
                scores.append(_with_gains(score, turns, np.append(np.diff(belief), 0.0)))
                known.append(float(belief[-1]))
                gained.append(float(belief[-1] - first))
            assert group.scores is not None
            groups.append(group.with_scores(replace(group.scores, samples=tuple(scores))))
        credit = super().credit(replace(experience, groups=groups))
        measured = {"igpo/answer": float(np.mean(known)), "igpo/gain": float(np.mean(gained))}
        return replace(credit, metrics={**credit.metrics, **measured})


def _asked(group: Group) -> Iterator[Sequence[int]]:
    """Yield the response tokens before each point where the answer's likelihood is measured: once at the beginning,
    which is the same for all samples, and then before every further turn of each sample."""
    yield ()
    for sample in group.samples:
        for turn in sample.turns[1:]:
            yield sample.token_ids[: turn.start].tolist()


def _with_gains(score: Score, turns: Sequence[Span], gains: Float64) -> Score:
    if not score.valid or not turns:
        return score
    spans = tuple(SpanReward(turn.start, turn.end, gain) for turn, gain in zip(turns, gains.tolist(), strict=True))
    return replace(score, token_rewards=None, span_rewards=spans)
