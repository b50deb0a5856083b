"""The stages that remake the embedded models; each reads earlier results and returns its measures."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.embedded_models.corpora import ProblemTokens, base_batches, careless_batches, tokenizer_texts
from examples.embedded_models.initial import save_untrained_policy, train_tokenizer
from examples.embedded_models.pairs import correctness
from examples.embedded_models.sampling import GREEDY, PLAIN, Sampling, load_policy, sample_answers
from examples.embedded_models.scale import Scale, Training
from examples.embedded_models.supervised import Example, SupervisedLearner
from rlkit.config.schema import LearnerConfig
from rlkit.data.arithmetic import WordProblem
from rlkit.data.rendering import load_tokenizer

log = logging.getLogger(__name__)
Measures = dict[str, Any]
ANSWERS_PER_PROBLEM = 8
REPORT_EVERY_SECONDS = 10.0
THREADS = 1
"""Two threads are hardly faster for models this small, and sums would then depend on the split."""


def warmup_steps(steps: int) -> int:
    return min(40, steps // 8 + 1)


def learner_config(training: Training) -> LearnerConfig:
    """AdamW with a short warm-up and cosine decay to 3 %."""
    return LearnerConfig(
        learning_rate=training.learning_rate,
        schedule="cosine",
        warmup_steps=warmup_steps(training.steps),
        min_learning_rate_ratio=0.03,
        betas=(0.9, 0.95),
        tokens_per_microbatch=8192,
    )


def run_steps(step: Callable[[Any], float], batches: Iterator[Any], steps: int, what: str) -> list[float]:
    """Run `steps` optimizer steps; return the loss before each."""
    losses, shown = [], time.monotonic()
    for number in range(1, steps + 1):
        losses.append(step(next(batches)))
        if time.monotonic() - shown > REPORT_EVERY_SECONDS or number == steps:
            shown = time.monotonic()
            print(f"  {what}: step {number}/{steps}  loss {losses[-1]:.4f}", flush=True)
    return losses


def make_tokenizer(problems: Sequence[WordProblem], scale: Scale, folder: Path) -> None:
    train_tokenizer(tokenizer_texts(problems[: scale.tokenizer_problems])).save_pretrained(folder)


def fine_tune(start: Path, training: Training, batches: Iterator[list[Example]], what: str, folder: Path) -> Measures:
    """Fine-tune the model in `start`, and save it with its tokenizer in `folder`."""
    learner = SupervisedLearner(start, learner_config(training), device="cpu", total_steps=training.steps)
    losses = run_steps(learner.step, batches, training.steps, what)
    learner.save(folder)
    load_tokenizer(start).save_pretrained(folder)
    return {"steps": training.steps, "first_loss": losses[0], "last_loss": sum(losses[-10:]) / len(losses[-10:])}


def make_base(tokenizer: Path, problems: Sequence[WordProblem], scale: Scale, seed: int, folder: Path) -> Measures:
    """Train the model that all policies start from, on exercises and right solutions."""
    untrained = folder.with_name(folder.name + "_untrained")
    loaded = load_tokenizer(tokenizer)
    save_untrained_policy(untrained, loaded, seed)
    batches = base_batches(ProblemTokens(problems, loaded), scale.data, scale.base.batch, seed)
    return fine_tune(untrained, scale.base, batches, "base model", folder)


def make_policy(base: Path, problems: Sequence[WordProblem], scale: Scale, seed: int, folder: Path) -> Measures:
    """Make the embedded policy, warm-started on careless solutions in all phrasings."""
    tokens = ProblemTokens(problems, load_tokenizer(base))
    batches = careless_batches(tokens, scale.slip_rate, scale.warm_start.batch, seed)
    return fine_tune(base, scale.warm_start, batches, "policy", folder)


def measure_policy(folder: Path, problems: Sequence[WordProblem], seed: int) -> Measures:
    """Measure accuracy at temperature 1 and greedy, and the share of problems with a right answer among eight."""
    sampled = correctness(problems, answers_of(folder, problems, ANSWERS_PER_PROBLEM, PLAIN, seed))
    greedy = correctness(problems, answers_of(folder, problems, 1, GREEDY, seed))
    return {
        "problems": len(problems),
        "accuracy_at_temperature_1": float(sampled.mean()),
        "accuracy_greedy": float(greedy.mean()),
        f"pass_at_{ANSWERS_PER_PROBLEM}": float(sampled.any(axis=1).mean()),
    }


def answers_of(
    folder: Path, problems: Sequence[WordProblem], count: int, sampling: Sampling, seed: int
) -> list[list[str]]:
    tokenizer = load_tokenizer(folder)
    prompts = ProblemTokens(problems, tokenizer).prompts
    return sample_answers(load_policy(folder), tokenizer, prompts, count, sampling, seed)


def sample_pool(
    base: Path, problems: Sequence[WordProblem], asked: Sequence[WordProblem], scale: Scale, seed: int, folder: Path
) -> dict[str, list[list[str]]]:
    """Fine-tune every policy of the pool; return variant -> its two answers to each problem of `asked`."""
    tokens = ProblemTokens(problems, load_tokenizer(base))
    trajectories: dict[str, list[list[str]]] = {}
    for number, variant in enumerate(scale.pool):
        own_seed = random.Random(f"{seed}/{variant.name}").randrange(2**31)
        batches = careless_batches(tokens, variant.slip_rate, scale.variant.batch, own_seed, (variant.style,))
        fine_tune(base, scale.variant, batches, f"pool {number + 1}/{len(scale.pool)} {variant.name}", folder)
        trajectories[variant.name] = answers_of(folder, asked, 2, Sampling(), own_seed)
    return trajectories
