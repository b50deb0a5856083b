"""The typed configuration of `rlkit.evaluate` and `rlkit.generate`: that of a run, with additions."""

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
    """model=endpoint: address of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1."""
    name: str | None = None
    """model=endpoint: the model's name there; null: the only one that the server lists."""
    token_env: str | None = None
    """model=endpoint: environment variable that holds the server's token."""


class EvaluateConfig(Section):
    """How often questions are answered, and what the numbers are compared with."""

    samples: int = Field(default=1, ge=0, le=MOST_SAMPLES)
    """Sampled answers to each question (the basis of avg@k, pass@k and others); 0: only greedy ones."""
    greedy: bool = False
    """Also answer each question once with the likeliest tokens, reported as a separate line."""
    questions: int | None = Field(default=None, ge=1)
    """Ask only this many questions, the first ones; null: all."""
    against: Path | None = None
    """Folder of another evaluation of the same questions, to compare with question by question."""
    answer_timeout_seconds: Deadline = 600.0
    """model=endpoint: time limit for one answer, including all tries."""


class EvaluateRun(RunConfig):
    """The whole configuration of `python -m rlkit.evaluate`. Training sections have no effect."""

    run: Path | None = None
    """A run whose checkpoints are evaluated, on its held-out problems and by its verifier unless others are named."""
    checkpoints: Literal["all", "last"] | tuple[int, ...] = "last"
    """Checkpoints of `run`: all, last, or a list of steps; all starts with the model before training, which is step
    0."""
    model: EvaluatedModel = EvaluatedModel()
    evaluate: EvaluateConfig = EvaluateConfig()
