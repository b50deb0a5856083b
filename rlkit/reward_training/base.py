"""The contract of a backend of `rlkit.train_reward`, and the shared configuration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from rlkit.config.schema import LearnerConfig
from rlkit.data.base import DataConfig
from rlkit.experience.section import Deadline, LearningRate, Section, Seed
from rlkit.models.folder import ModelFolderError, check_model_folder
from rlkit.reward_training.rows import RewardDataConfig

Stage = Literal["train", "evaluate", "pretrain", "finetune", "generate"]


class TrainRewardConfig(Section):
    stage: Stage = "train"
    """train: train and save `model/`; evaluate: judge the model on all rows of the data. reward=polar trains in two
    stages, pretrain and finetune, and can generate its pre-training data."""
    seed: Seed = 0
    """Seeds the order of the rows and everything else that is random."""
    run_dir: Path
    """Folder of this run's files; created if missing, refused if it already holds a run."""
    dry_run: bool = False
    """Validate, report what would be done, and exit."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the model."""
    threads: int = Field(default=2, ge=1)
    """CPU threads of each rank."""
    rank_timeout_seconds: Deadline = 1800.0
    """With several ranks: how long one may keep the others waiting before all are ended with a message that names a
    waiting rank. Must exceed the work that one rank does alone (saving the model)."""
    reward: dict[str, Any]
    """The backend: `_target_` and the fields of its `Config`."""
    data: dict[str, Any] = Field(default={})
    """The rows: the fields of the backend's `Data`."""


class RewardTrainingConfig(Section):
    """Fields of every backend; its nested `Config` may change the defaults."""

    model_path: str = "embedded:policy"
    """Folder of the Hugging Face model that training starts from, with its tokenizer."""
    trust_remote_code: bool = False
    """Run Python code found in the model folder. Leave it off unless you know who wrote it."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows; may be fractional."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per optimizer step."""
    learning_rate: LearningRate = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after warm-up, down to `min_learning_rate_ratio` at the last step."""
    warmup_share: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps with linear warm-up (rounded up)."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's moment decays."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    tokens_per_microbatch: int = Field(default=16384, ge=1)
    """Tokens per forward and backward pass (a prompt shared by responses counts once)."""
    ranks: int = Field(default=1, ge=1)
    """Data-parallel processes."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed ZeRO stage: what is partitioned over ranks (1 optimizer, 2 + gradients, 3 + parameters). null: 1 with
    bfloat16 weights, else 0."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 (with fp32 master weights) on CUDA, float32 on CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    evaluate_every_steps: int = Field(default=0, ge=0)
    """Steps between held-out evaluations, besides those before and after training. 0: only those two."""

    def total_steps(self, examples: int) -> int:
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(examples / self.batch_size)))

    def learner(self, total_steps: int, device: str) -> LearnerConfig:
        shared = {name: getattr(self, name) for name in LearnerConfig.model_fields if hasattr(self, name)}
        if self.zero_stage is None:
            wide = self.dtype == "float32" or (self.dtype == "auto" and device == "cpu")
            shared["zero_stage"] = 0 if wide else 1
        return LearnerConfig(**shared, warmup_steps=math.ceil(self.warmup_share * total_steps))

    @model_validator(mode="after")
    def _bfloat16_needs_master_weights(self) -> RewardTrainingConfig:
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError("zero_stage=0 keeps no fp32 master weights; with dtype=bfloat16 use 1, 2, 3 or null")
        return self


@dataclass(frozen=True)
class TrainingContext:
    run_dir: Path
    device: str = "cpu"
    seed: int = 0
    rank: int = 0
    stage: Stage = "train"

    @property
    def model_folder(self) -> Path:
        return self.run_dir / "model"


class Report(Protocol):
    """How a backend reports progress. On ranks other than 0, all calls do nothing."""

    def phase(self, name: str) -> None: ...

    def begins(self, total_steps: int) -> None:
        """Show the steps done and the time left from here on."""

    def __call__(self, step: int, **metrics: float) -> None:
        """Report a step's metrics, named `area/name`: `**{"prm/loss": 0.6}`. Step 0 is before the first."""

    def evaluation(self, step: int, **metrics: float) -> None: ...

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def text(self, text: str) -> None: ...

    def warn(self, message: str) -> None: ...


class RewardTraining(ABC):
    """One kind of reward model; created on every rank, in an initialised process group with `threads` set.

    Training must leave the model in `context.model_folder` (rank 0 writes). Errors for the user: `DataError`,
    `ModelLoadError`.
    """

    Config: ClassVar[type[RewardTrainingConfig]] = RewardTrainingConfig
    Data: ClassVar[type[DataConfig]] = RewardDataConfig
    stages: ClassVar[tuple[Stage, ...]] = ("train",)
    """Any other stage is refused at the start."""

    def __init__(self, config: Any, data: Any, context: TrainingContext) -> None:
        self.config, self.data, self.context = config, data, context

    @classmethod
    def check(cls, config: Any, data: Any) -> list[str]:
        """Return the messages of cheap checks, made without torch, each starting with its key.

        Subclasses add to `super().check(config, data)`.
        """
        messages = []
        try:
            check_model_folder(config.model_path)
        except ModelFolderError as error:
            messages.append(f"reward.model_path={config.model_path}: {error}")
        return messages + (data.problems() if isinstance(data, RewardDataConfig) else [])

    @abstractmethod
    def run(self, report: Report) -> dict[str, Any]:
        """Run `context.stage`; return the content of summary.json."""
