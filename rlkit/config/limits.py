"""Checks of numbers and names that are allowed but probably not intended."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from algorithms.base import Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.metric_table import VARIES, rows, stands_for
from rlkit.config.schema import CriticConfig, EvaluationConfig, LearnerConfig, TrainerConfig
from rlkit.data.base import DataSource
from rlkit.experience.names import edits, nearest

HIGH_RATE, ABSURD_RATE = 0.01, 0.1
MANY_RESPONSES = 65536
"""Responses per step; published runs use up to about 16,000."""
STALE_VERSIONS = 8
HIGH_KL, HIGH_ENTROPY = 10, 1


def learning_rates_are_meant(learner: LearnerConfig, critic: CriticConfig) -> Issues:
    for section, config in (("learner", learner), ("critic", critic)):
        if config.learning_rate >= HIGH_RATE:
            yield ConfigIssue(
                f"{section}.learning_rate",
                "AdamW moves every weight by about this much in each step, which destroys a trained model; usual "
                "values are 1e-7 to 1e-4, and up to 1e-3 for tiny models",
                warning=config.learning_rate < ABSURD_RATE,
            )


def coefficients_are_meant(algorithm: Algorithm) -> Issues:
    for name, limit, usual in (("kl_coefficient", HIGH_KL, 0.04), ("entropy_coefficient", HIGH_ENTROPY, 0.01)):
        if getattr(algorithm.config, name, 0) > limit:
            yield ConfigIssue(
                f"algorithm.{name}",
                f"outweighs the rewards, so they teach nothing; usual values are 0 to {usual}",
                warning=True,
            )


def steps_are_of_a_size(trainer: TrainerConfig, algorithm: Algorithm) -> Issues:
    samples = algorithm.config.samples_per_prompt
    responses = trainer.prompts_per_step * samples
    if responses > MANY_RESPONSES:
        key = "trainer.prompts_per_step" if trainer.prompts_per_step > samples else "algorithm.samples_per_prompt"
        yield ConfigIssue(
            key,
            f"{responses:,} responses in each of {trainer.total_steps:,} steps ({samples:,} for each prompt), "
            f"{responses * trainer.total_steps:,} in the run; published runs use up to about 16,000 a step",
            warning=True,
        )


def staleness_is_bounded(trainer: TrainerConfig) -> Issues:
    stale = trainer.max_staleness
    if stale > 1 and stale >= trainer.total_steps:
        yield ConfigIssue(
            "trainer.max_staleness",
            f"all of the {trainer.total_steps} steps (trainer.total_steps) could be sampled from the initial policy; "
            "usual values are 0 (synchronous) to 4",
        )
    elif stale > STALE_VERSIONS:
        yield ConfigIssue(
            "trainer.max_staleness",
            f"responses may come from a policy {stale} updates old, for which the loss is not valid; usual values are "
            "0 (synchronous) to 4",
            warning=True,
        )


def best_metric_exists(trainer: TrainerConfig, evaluation: EvaluationConfig) -> Issues:
    """A user's reward or algorithm may report metrics with other names."""
    name = trainer.best_metric
    if name is None:
        return
    named = [metric for row in rows() for metric in row.names if not metric.startswith("evaluation/NAME/")]
    of_sets = [f"evaluation/{one}/..." for one in evaluation.sets]
    if any(stands_for(metric, name) for metric in (*named, *of_sets)):
        return
    guess = nearest(name, (metric for metric in named if not VARIES.search(metric)))
    hint = f"did you mean {guess}? " if guess else ""
    mistyped = "/" not in name or (guess is not None and edits(name, guess) == 1)
    yield ConfigIssue(
        "trainer.best_metric",
        f"{hint}No metric of rlkit has this name, and without it there is no best checkpoint; docs/metrics.md lists "
        "all metrics (area/name, like accuracy/heldout)",
        warning=not mistyped,
    )


def intervals_happen(trainer: TrainerConfig, typed: AbstractSet[str]) -> Issues:
    """Check the intervals that the user set; those of presets are meant for longer runs."""
    if trainer.total_epochs is not None:
        return  # the number of steps depends on the data
    for name in ("evaluate_every_steps", "save_every_steps"):
        every = getattr(trainer, name)
        if every > trainer.total_steps and f"trainer.{name}" in typed:
            yield ConfigIssue(
                f"trainer.{name}", f"is never reached: trainer.total_steps={trainer.total_steps}", warning=True
            )


def questions_suffice(data: DataSource, trainer: TrainerConfig) -> Issues:
    count = getattr(data.config, "train_problems", None)
    if isinstance(count, int) and count < trainer.prompts_per_step:
        yield ConfigIssue(
            "data.train_problems",
            f"is less than trainer.prompts_per_step={trainer.prompts_per_step}: each step asks the same questions "
            "several times",
            warning=True,
        )


LIMITS = (
    learning_rates_are_meant,
    coefficients_are_meant,
    steps_are_of_a_size,
    staleness_is_bounded,
    best_metric_exists,
    intervals_happen,
    questions_suffice,
)
