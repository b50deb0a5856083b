"""Pre-training, fine-tuning and judging the embedded POLAR discriminator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rewards.polar.serialise import Limits
from rlkit.data.arithmetic import STYLES, WordProblem, write_solution
from rlkit.embedded.initial import save_untrained_scorer
from rlkit.embedded.judging import correctness, is_right
from rlkit.embedded.pairs import (
    Trajectories,
    attainable_accuracy,
    expected_accuracy,
    labelled_triplets,
    policy_triplets,
)
from rlkit.embedded.scale import Scale, Training
from rlkit.embedded.stages import Measures, learner_config, run_steps
from rlkit.polar_training.learner import PolarLearner
from rlkit.polar_training.triplets import Triplet

LIMITS = Limits(max_length=1024, max_response_length=256)
"""What `reward=polar` uses with a model of 1024 positions: a quarter of them for each response."""


def pretrain(
    tokenizer: Any,
    base: Path,
    problems: Sequence[WordProblem],
    pool: Trajectories,
    scale: Scale,
    seed: int,
    folder: Path,
) -> Measures:
    """Tell policies apart (equation 7) on the pool's training policies, then measure on those held out."""
    untrained = folder.with_name(folder.name + "_untrained")
    save_untrained_scorer(untrained, tokenizer, seed, body=base)
    training, heldout = (
        {variant: answers for variant, answers in pool.items() if variant.heldout is held} for held in (False, True)
    )
    triplets = policy_triplets(problems, training)
    learner = _learner(untrained, scale.pretrain)
    losses = run_steps(
        learner.step, _shuffled(triplets, scale.pretrain.batch, seed), scale.pretrain.steps, "pre-training"
    )
    learner.save(folder)
    unseen = policy_triplets(problems, heldout)
    measured = learner.measure(unseen)
    errors = {variant: 1 - float(correctness(problems, answers).mean()) for variant, answers in pool.items()}
    return {
        "triplets": len(triplets),
        "steps": scale.pretrain.steps,
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-20:])),
        "policies": {
            variant.name: {"error_rate": round(errors[variant], 4), "heldout": variant.heldout} for variant in pool
        },
        "heldout_policies": {
            "triplets": len(unseen),
            "same_versus_different_accuracy": measured.accuracy,
            "attainable": attainable_accuracy(unseen),
            "attainable_from_error_rates": expected_accuracy({v: e for v, e in errors.items() if v.heldout}),
        },
    }


def finetune(
    start: Path,
    problems: Sequence[WordProblem],
    sampled: Sequence[Sequence[str]],
    scale: Scale,
    seed: int,
    folder: Path,
) -> Measures:
    """Tell right from wrong with the gold solution as reference (equation 8)."""
    learner = _learner(start, scale.finetune)
    batches = _taken(labelled_triplets(problems, sampled, seed), scale.finetune.batch)
    losses = run_steps(learner.step, batches, scale.finetune.steps, "fine-tuning")
    learner.save(folder)
    return {"steps": scale.finetune.steps, "first_loss": losses[0], "last_loss": float(np.mean(losses[-20:]))}


def measure_discriminator(
    folder: Path, problems: Sequence[WordProblem], sampled: Sequence[Sequence[str]], seed: int
) -> Measures:
    """Right-versus-wrong accuracy on held-out problems: answers by rule in the reference's phrasing and in another,
    and answers sampled from the embedded policy against the first reference, as `reward=polar` compares them."""
    learner = _learner(folder, Training(1, 1, 1e-3))
    nothing: list[list[str]] = [[] for _ in problems]
    count = 2 * len(problems)
    same = learner.measure(list(islice(labelled_triplets(problems, nothing, seed, crossed=False), count)))
    crossed = learner.measure(list(islice(labelled_triplets(problems, nothing, seed, crossed=True), count)))
    from_policy = learner.measure(_sampled_pairs(problems, sampled))
    return {
        "problems": len(problems),
        "right_versus_wrong_same_phrasing": same.accuracy,
        "right_versus_wrong_crossed_phrasing": crossed.accuracy,
        "right_versus_wrong_policy_samples": from_policy.accuracy,
    }


def _sampled_pairs(problems: Sequence[WordProblem], sampled: Sequence[Sequence[str]]) -> list[Triplet]:
    """Every (right, wrong) pair of distinct sampled answers of a problem."""
    triplets = []
    for problem, texts in zip(problems, sampled, strict=True):
        reference = write_solution(problem.steps, problem.thing, STYLES[0])
        distinct = list(dict.fromkeys(texts))
        right = [text for text in distinct if is_right(text, problem.answer)]
        wrong = [text for text in distinct if not is_right(text, problem.answer)]
        triplets += [Triplet(problem.question, reference, a, b) for a in right for b in wrong]
    return triplets


def _learner(start: Path, training: Training) -> PolarLearner:
    return PolarLearner(
        start, learner_config(training), device="cpu", total_steps=training.steps, limits=LIMITS, wrapper="sft"
    )


def _shuffled(triplets: Sequence[Triplet], size: int, seed: int) -> Iterator[list[Triplet]]:
    rng = random.Random(f"shuffled/{seed}")
    queue: list[Triplet] = []
    while True:
        if len(queue) < size:
            queue += rng.sample(triplets, len(triplets))
        yield [queue.pop() for _ in range(size)]


def _taken(triplets: Iterator[Triplet], size: int) -> Iterator[list[Triplet]]:
    while True:
        yield list(islice(triplets, size))
