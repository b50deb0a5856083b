"""Sizes of every stage: for the shipped models (`full`), and for a run that takes seconds (`fast`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlkit.data.arithmetic import ArithmeticConfig, Style


@dataclass(frozen=True)
class Training:
    steps: int
    batch: int
    """Examples per optimizer step; for POLAR, triplets."""
    learning_rate: float


@dataclass(frozen=True)
class Variant:
    """A policy in the pool for POLAR's trajectories: a phrasing, and the probability of a wrong step."""

    style: Style
    slip_rate: float
    heldout: bool = False
    """Not trained on; used to measure same-versus-different accuracy."""

    @property
    def name(self) -> str:
        return f"{self.style}-{self.slip_rate:g}"


POOL: tuple[Variant, ...] = (
    *(
        Variant(style, slip_rate)
        for style in ("equations", "words", "annotated", "running")
        for slip_rate in (0.0, 0.3, 0.7)
    ),
    *(Variant(style, slip_rate, heldout=True) for style in ("equations", "annotated") for slip_rate in (0.1, 0.5)),
)


@dataclass(frozen=True)
class Scale:
    data: ArithmeticConfig
    tokenizer_problems: int
    base: Training
    warm_start: Training
    slip_rate: float
    """Slip rate of the solutions that the embedded policy imitates, which gives it headroom."""
    variant: Training
    pool: tuple[Variant, ...]
    trajectory_prompts: int
    """Prompts with two answers from every policy of the pool."""
    policy_prompts: int
    """Training prompts with four answers from the embedded policy, for fine-tuning pairs."""
    pretrain_last_lines: Training
    """First stage, only on last lines of trajectories, which teach reading and comparing numbers sooner."""
    pretrain: Training
    finetune_last_lines: Training
    finetune: Training
    judged_problems: int
    """Held-out problems for the report."""
    agent_base: Training
    """Training on players whose moves are nearly all sensible."""
    agent: Training
    """Training on players who play badly, which gives the agent headroom."""
    matches: int
    """Matches of each game, in each of the two trainings."""
    judged_matches: int
    """Held-out tasks of every game for the report."""


FULL = Scale(
    data=ArithmeticConfig(),
    tokenizer_problems=8192,
    base=Training(steps=1200, batch=64, learning_rate=3e-3),
    warm_start=Training(steps=80, batch=64, learning_rate=7e-4),
    slip_rate=0.33,
    variant=Training(steps=25, batch=48, learning_rate=1e-3),
    pool=POOL,
    trajectory_prompts=256,
    policy_prompts=1024,
    pretrain_last_lines=Training(steps=300, batch=96, learning_rate=1e-3),
    pretrain=Training(steps=100, batch=48, learning_rate=1e-3),
    finetune_last_lines=Training(steps=300, batch=128, learning_rate=1e-3),
    finetune=Training(steps=350, batch=384, learning_rate=1e-3),
    judged_problems=512,
    agent_base=Training(steps=1000, batch=32, learning_rate=3e-3),
    agent=Training(steps=80, batch=32, learning_rate=1e-3),
    matches=2048,
    judged_matches=128,
)
FAST = replace(
    FULL,
    data=ArithmeticConfig(
        max_steps=1, max_operand=6, max_value=16, max_factor=3, train_problems=600, heldout_problems=64
    ),
    tokenizer_problems=600,
    base=Training(steps=30, batch=32, learning_rate=3e-3),
    warm_start=Training(steps=5, batch=32, learning_rate=1e-3),
    variant=Training(steps=2, batch=16, learning_rate=1e-3),
    pool=tuple(variant for variant in POOL if variant.style == "equations"),
    trajectory_prompts=16,
    policy_prompts=64,
    pretrain_last_lines=Training(steps=3, batch=24, learning_rate=2e-3),
    pretrain=Training(steps=2, batch=24, learning_rate=2e-3),
    finetune_last_lines=Training(steps=3, batch=64, learning_rate=2e-3),
    finetune=Training(steps=25, batch=192, learning_rate=2e-3),
    judged_problems=32,
    agent_base=Training(steps=20, batch=32, learning_rate=3e-3),
    agent=Training(steps=4, batch=32, learning_rate=1e-3),
    matches=32,
    judged_matches=8,
)
SCALES = {"full": FULL, "fast": FAST}
