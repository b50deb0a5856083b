"""Pre-training, fine-tuning and judging the embedded POLAR discriminator."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from rewards.polar.serialise import Limits
from rlkit.data.arithmetic import STYLES, WordProblem, write_solution
from rlkit.data.prompts import load_tokenizer
from rlkit.embedded.initial import save_untrained_scorer
from rlkit.embedded.judging import correctness, is_right
from rlkit.embedded.pairs import final_answers, labelled_triplets, marked_answer, phrasing, variant_triplets
from rlkit.embedded.scale import Scale, Training
from rlkit.embedded.stages import REPORT_EVERY_SECONDS, Measures, learner_config
from rlkit.polar_training.learner import PolarLearner
from rlkit.polar_training.pairs import attainable_accuracy, batches_of_groups, expected_accuracy, shuffled
from rlkit.polar_training.phases import Phase, train
from rlkit.polar_training.triplets import Triplet

LIMITS = Limits(max_length=1024, max_response_length=256)
"""What `reward=polar` uses with a model of 1024 positions: a quarter of them for each response."""


AnswersByName = Mapping[str, Sequence[Sequence[str]]]
"""Name of a variant -> per prompt, its two answers."""


def with_trajectories(sampled: Sequence[Sequence[str]], answers: AnswersByName, scale: Scale) -> list[list[str]]:
    """Per problem the embedded policy's answers, and those of the pool's training policies where it was asked."""
    candidates = [list(texts) for texts in sampled]
    for variant in scale.pool:
        if not variant.heldout:
            for place, texts in enumerate(answers[variant.name][: len(candidates)]):
                candidates[place] += texts
    return candidates


def pretrain(
    tokenizer: Path,
    base: Path,
    problems: Sequence[WordProblem],
    answers: AnswersByName,
    scale: Scale,
    seed: int,
    folder: Path,
) -> Measures:
    """Tell policies apart (equation 7) on the pool's training policies, then measure on those held out."""
    pool = {variant: answers[variant.name] for variant in scale.pool}
    untrained = folder.with_name(folder.name + "_untrained")
    save_untrained_scorer(untrained, load_tokenizer(tokenizer), seed, body=base)
    training, heldout = (
        {variant: texts for variant, texts in pool.items() if variant.heldout is held} for held in (False, True)
    )
    learner = _learner(untrained, scale.pretrain_last_lines.steps + scale.pretrain.steps, scale.pretrain.learning_rate)
    phases = [
        Phase(
            batches_of_groups(shuffled(variant_triplets(problems, training, last_line_only), seed), stage.batch),
            stage.steps,
        )
        for stage, last_line_only in ((scale.pretrain_last_lines, True), (scale.pretrain, False))
    ]
    losses = train(learner, phases, _said("pre-training", phases))
    learner.save(folder)
    unseen = list(chain.from_iterable(variant_triplets(problems, heldout)))
    measured = learner.measure(unseen)
    errors = {variant: 1 - float(correctness(problems, texts).mean()) for variant, texts in pool.items()}
    return {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-20:])),
        "policies": {
            variant.name: {"error_rate": round(errors[variant], 4), "heldout": variant.heldout} for variant in pool
        },
        "heldout_policies": {
            "triplets": len(unseen),
            "same_versus_different_accuracy": measured.accuracy,
            "attainable": attainable_accuracy(unseen, marked_answer),
            "attainable_from_error_rates": expected_accuracy({v: e for v, e in errors.items() if v.heldout}, phrasing),
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
    learner = _learner(start, scale.finetune_last_lines.steps + scale.finetune.steps, scale.finetune.learning_rate)
    phases = [
        Phase(batches_of_groups(groups, stage.batch), stage.steps)
        for stage, groups in (
            (scale.finetune_last_lines, final_answers(problems, seed)),
            (scale.finetune, labelled_triplets(problems, sampled, seed)),
        )
    ]
    losses = train(learner, phases, _said("fine-tuning", phases))
    learner.save(folder)
    return {"steps": len(losses), "first_loss": losses[0], "last_loss": float(np.mean(losses[-20:]))}


def measure_discriminator(
    folder: Path, problems: Sequence[WordProblem], sampled: Sequence[Sequence[str]], seed: int
) -> Measures:
    """Right-versus-wrong accuracy on held-out problems: answers by rule in the reference's phrasing and in another,
    and answers sampled from the embedded policy against the first reference, as `reward=polar` compares them."""
    learner = _learner(folder, 1, 1e-3)
    nothing: list[list[str]] = [[] for _ in problems]
    same, crossed = (
        learner.measure(next(batches_of_groups(labelled_triplets(problems, nothing, seed, crossed), len(problems))))
        for crossed in (False, True)
    )
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


def _learner(start: Path, steps: int, learning_rate: float) -> PolarLearner:
    config = learner_config(Training(steps, 1, learning_rate))
    return PolarLearner(start, config, device="cpu", total_steps=steps, limits=LIMITS, wrapper="sft")


def _said(what: str, phases: Sequence[Phase]) -> Callable[[int, float], None]:
    """Prints a step now and then, and the last one of each phase."""
    steps, shown = [phase.steps for phase in phases], time.monotonic()
    ends = {sum(steps[: i + 1]) for i in range(len(steps))}

    def said(step: int, loss: float) -> None:
        nonlocal shown
        if time.monotonic() - shown > REPORT_EVERY_SECONDS or step in ends:
            shown = time.monotonic()
            print(f"  {what}: step {step}/{sum(steps)}  loss {loss:.4f}", flush=True)

    return said
