"""Triplets from what policies wrote: policies told apart (pre-training), right and wrong (fine-tuning)."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from rlkit.polar_training.triplets import Triplet

Policy = TypeVar("Policy", bound=Hashable)


def policy_triplets(
    prompts: Sequence[str],
    answers: Mapping[Policy, Sequence[Sequence[str]]],
    style_of: Callable[[Policy], str],
    kept: Callable[[str], str] = str,
) -> list[list[Triplet]]:
    """Reference and chosen by one policy, rejected by another *of the same style*: equation 7.

    Were styles mixed within a triplet, style alone would tell the policies apart, and nothing about quality would be
    learnt. `answers[policy][i]` are its answers to prompt i: each is the reference to the next one; a policy with fewer
    than two is only ever the other one. `kept` is what is left of an answer. All ordered pairs of policies are used;
    triplets with one prompt and one reference come together; those whose candidates are equal are left out.
    """
    rivals: dict[Policy, list[Policy]] = {}
    for a, b in rival_pairs(list(answers), style_of):
        rivals.setdefault(a, []).append(b)
    found = []
    for a, others in rivals.items():
        for place, prompt in enumerate(prompts):
            own = [kept(text) for text in answers[a][place]]
            for turn, (reference, chosen) in enumerate(pairwise(own)):
                theirs = [answers[b][place] for b in others]
                rejected = dict.fromkeys(kept(texts[turn % len(texts)]) for texts in theirs if texts)
                found.append([Triplet(prompt, reference, chosen, text) for text in rejected if text != chosen])
    return [triplets for triplets in found if triplets]


def rival_pairs(policies: Sequence[Policy], style_of: Callable[[Policy], str]) -> list[tuple[Policy, Policy]]:
    """Ordered pairs of different policies of one style."""
    return [(a, b) for a in policies for b in policies if a != b and style_of(a) == style_of(b)]


def labelled_triplets(prompt: str, reference: str | None, right: Sequence[str], wrong: Sequence[str]) -> list[Triplet]:
    """Chosen is right and rejected is wrong: equation 8. Without a gold reference, right answers are each other's."""
    right, wrong = list(dict.fromkeys(right)), list(dict.fromkeys(wrong))
    if reference is not None:
        return [Triplet(prompt, reference, good, bad) for good in right for bad in wrong]
    return [Triplet(prompt, best, good, bad) for best, good in pairwise(right) for bad in wrong]


def attainable_accuracy(triplets: Sequence[Triplet], final: Callable[[str], str]) -> float:
    """Accuracy of a scorer that only asks whose final answer agrees with the reference's (undecided counts a half).

    Two answers of one careful policy agree more often than those of a careful and a careless one. It is a ceiling for
    whoever judges by results; what is left is chance.
    """
    wins = []
    for triplet in triplets:
        gold = final(triplet.reference)
        wins.append(0.5 + 0.5 * ((final(triplet.chosen) == gold) - (final(triplet.rejected) == gold)))
    return float(np.mean(wins))


def expected_accuracy(error_rates: Mapping[Policy, float], style_of: Callable[[Policy], str]) -> float:
    """The same from error rates alone: 1/2 + 1/2 mean over pairs (A, B) of (1 - e_A)(e_B - e_A)."""
    pairs = rival_pairs(list(error_rates), style_of)
    return 0.5 + 0.5 * float(np.mean([(1 - error_rates[a]) * (error_rates[b] - error_rates[a]) for a, b in pairs]))


def shuffled(groups: Sequence[list[Triplet]], seed: int) -> Iterator[list[Triplet]]:
    """The groups for ever, in a new order in each epoch."""
    rng = random.Random(f"shuffled/{seed}")
    while True:
        yield from rng.sample(groups, len(groups))


def batches_of_triplets(groups: Iterator[list[Triplet]], size: int) -> Iterator[list[Triplet]]:
    """`size` triplets at a time; those of a group stay neighbours, and what they share is computed once."""
    queue: list[Triplet] = []
    while True:
        while len(queue) < size:
            queue += next(groups)
        yield queue[:size]
        queue = queue[size:]
