"""The typed configuration of `rlkit.evaluate` and `rlkit.generate`: that of a run, and what they add."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rlkit.config.schema import ModelConfig, RunConfig
from rlkit.experience.section import Deadline, Section

MOST_SAMPLES = 512


class EvaluatedModel(ModelConfig):
    """The model that answers."""

    url: str | None = None
    """model=endpoint: address of an OpenAI-compatible server, like http://127.0.0.1:8000/v1."""
    name: str | None = None
    """model=endpoint: the model's name there; null: the only one that the server lists."""
    token_env: str | None = None
    """model=endpoint: environment variable with the token that the server wants."""


class EvaluateConfig(Section):
    """How often questions are answered, and with what the numbers are compared."""

    samples: int = Field(default=1, ge=0, le=MOST_SAMPLES)
    """Sampled answers to each question (avg@k, pass@k and others are of these); 0: greedy ones alone."""
    greedy: bool = False
    """Besides, one answer of the likeliest tokens to each question: a line of its own."""
    questions: int | None = Field(default=None, ge=1)
    """At most so many questions, the first ones; null: all."""
    against: Path | None = None
    """Folder of another evaluation of the same questions, to be compared with question by question."""
    answer_timeout_seconds: Deadline = 600.0
    """model=endpoint: time for one answer, with all tries."""


class EvaluateRun(RunConfig):
    """The whole configuration of `python -m rlkit.evaluate`. Sections of training have no effect."""

    run: Path | None = None
    """A run whose checkpoints are evaluated, on its held-out problems and by its verifier unless others are named."""
    checkpoints: Literal["all", "last"] | tuple[int, ...] = "last"
    """Of `run`: all, last, or a list of steps; all begins with the model before training, which is step 0."""
    model: EvaluatedModel = EvaluatedModel()
    evaluate: EvaluateConfig = EvaluateConfig()
