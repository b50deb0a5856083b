"""How good a discriminator is: policies told apart, right above wrong, and how its scores follow the labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.verifiers.math import final_answer
from rlkit.polar_training.learner import PolarLearner
from rlkit.polar_training.pairs import attainable_accuracy, labelled_triplets, policy_triplets
from rlkit.polar_training.rows import Asked
from rlkit.polar_training.triplets import Triplet


def final(text: str) -> str:
    """The marked final answer of a response, or the response itself where it marks none."""
    found = final_answer(text)
    return text.strip() if found is None else found.text


def contrasts(asked: Sequence[Asked], policies: Sequence[str], across_styles: bool = False) -> list[list[Triplet]]:
    """Pre-training triplets from the trajectories of these policies (see policy_triplets)."""
    answers: dict[tuple[str, str], list[list[str]]] = {}
    for place, each in enumerate(asked):
        for trajectory in each.trajectories:
            if trajectory.policy in policies:
                key = (trajectory.policy, "" if across_styles else trajectory.style)
                answers.setdefault(key, [[] for _ in asked])[place].append(trajectory.text)
    prompts = [each.prompt for each in asked]
    return policy_triplets(prompts, dict(sorted(answers.items())), lambda policy_and_style: policy_and_style[1])


def verdicts(asked: Sequence[Asked]) -> list[list[Triplet]]:
    """Fine-tuning triplets: those that the rows give, and right against wrong where responses have labels.

    Triplets with one prompt and one reference come together: what they share is then computed once.
    """
    groups: dict[tuple[str, str], list[Triplet]] = {}
    for each in asked:
        right, wrong = ([t.text for t in each.trajectories if t.correct is label] for label in (True, False))
        for triplet in each.triplets + labelled_triplets(each.prompt, each.reference, right, wrong):
            groups.setdefault((triplet.prompt, triplet.reference), []).append(triplet)
    return list(groups.values())


def measure(
    learner: PolarLearner, asked: Sequence[Asked], policies: Sequence[str], across_styles: bool = False
) -> dict[str, float]:
    """Everything that can be measured on these prompts."""
    found: dict[str, float] = {}
    told_apart = [triplet for group in contrasts(asked, policies, across_styles) for triplet in group]
    if told_apart:
        measured = learner.measure(told_apart)
        found["same_versus_different_loss"] = measured.loss
        found["same_versus_different_accuracy"] = measured.accuracy
        found["same_versus_different_attainable"] = attainable_accuracy(told_apart, final)
        found["same_versus_different_triplets"] = len(told_apart)
    judged = [triplet for group in verdicts(asked) for triplet in group]
    if judged:
        measured = learner.measure(judged)
        found["right_versus_wrong_loss"] = measured.loss
        found["right_versus_wrong_accuracy"] = measured.accuracy
        found["right_versus_wrong_triplets"] = len(judged)
    labelled = [
        (each, trajectory)
        for each in asked
        for trajectory in each.trajectories
        if each.reference is not None and trajectory.correct is not None
    ]
    if len({trajectory.correct for _, trajectory in labelled}) == 2:
        scores = learner.scores([(each.prompt, each.reference or "", t.text) for each, t in labelled])
        right = [float(bool(trajectory.correct)) for _, trajectory in labelled]
        found["pearson"] = correlation(scores, right)
        found["spearman"] = correlation(ranks(scores), ranks(right))
        found["labelled_responses"] = len(labelled)
    return found


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's; 0 where one side does not vary."""
    x, y = (np.asarray(values, dtype=np.float64) - np.mean(values) for values in (left, right))
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / size) if size > 0 else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Places from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle: list[float] = ((ends - 1 + ends - counts) / 2)[inverse].tolist()
    return middle
