"""`reward=progress`: a final reward, distributed over the turns that led to it (SPA-RL, arXiv 2505.20732).

A linear head on a frozen model's hidden state at the last token of each turn k estimates the turn's contribution,

    c_k = w . h_k,    with w minimising (sum over k of c_k - R)^2 over all episodes seen so far,

which ridge regression solves exactly after every step. A turn earns
`progress_weight` c_k + `executed_weight` g_k, where g_k = 1 if its calls could be read, and always on the last turn.
The authors instead train a whole model with a head before the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rewards.base import RewardContext, RewardTraits, TrainableReward
from rewards.parts import OutcomeConfig, load_part, outcome_problems, with_outcome
from rlkit.experience import Group, GroupScores, Sample, Score
from rlkit.experience.types import SpanReward

if TYPE_CHECKING:
    from rewards.services.scorer import Scorer

Float64 = NDArray[np.float64]
OUTCOME = {"_target_": "rewards.environment.EnvironmentReward", "per_turn": False}


class ProgressReward(TrainableReward):
    class Config(OutcomeConfig):
        model_path: str = "embedded:agent"
        """Folder of the frozen model whose hidden states are read: the policy, or another model with its tokenizer."""
        outcome: dict[str, Any] = Field(default=OUTCOME)
        """The reward whose values are distributed over the turns: `_target_` and its fields."""
        value: Literal["outcome", "none"] = "outcome"
        """none: no value, for algorithms that learn only from turns or add value and process rewards, like PPO."""
        progress_weight: float = Field(default=1.0, ge=0)
        """Weight of a turn's estimated contribution."""
        executed_weight: float = Field(default=0.5, ge=0)
        """Reward of a turn whose calls can all be read (0.5 in the authors' script)."""
        ridge: float = Field(default=0.01, gt=0)
        """Keeps the estimate near 0; states are scaled to length 1. Larger: slower and steadier."""

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        kind, options = load_part(config.outcome)
        self._outcome = kind(options, context)
        self._scorer: Scorer | None = None
        self.head = Ridge(config.ridge)

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        value = config.value == "outcome"
        own = RewardTraits(
            judges_texts=False,
            environment=True,
            joins_tokens=True,
            process_rewards=True,
            process_in_value=value,
            outcome_rewards=value,
            update_when="after",
        )
        return with_outcome(own, config.outcome)

    @classmethod
    def check(cls, config: Any) -> list[str]:
        from rlkit.models.folder import ModelFolderError, check_model_folder

        messages = [*super().check(config), *outcome_problems(config.outcome, config.timeout_seconds)]
        try:
            check_model_folder(config.model_path)
        except ModelFolderError as error:
            messages.append(f"reward.model_path: {error}")
        return messages

    def start(self) -> None:
        from rewards.services.scorer import Scorer  # torch loads only where a reward runs

        self._outcome.start()
        context = self.context
        # One forward pass per group, so that learning finds the states that scoring has cached.
        self._scorer = Scorer.load(
            self.config.model_path, device=context.device, threads=context.threads, tokens_per_batch=None
        )

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        states = self._states(groups)
        scored = []
        for group, outcomes in zip(groups, self._outcome.score(groups), strict=True):
            rows = [
                self._shared_out(score, sample, next(states))
                for sample, score in zip(group.samples, outcomes.samples, strict=True)
            ]
            scored.append(GroupScores(tuple(rows), outcomes.pairs))
        return scored

    def _shared_out(self, outcome: Score, sample: Sample, states: Float64) -> Score:
        turns = sample.turns
        if not outcome.valid or outcome.value is None or not turns:
            return outcome if not outcome.valid else Score.invalid("no_outcome: there is none to share out, or no turn")
        config, shares = self.config, self.head(states)
        executed = np.array([not turn.data.get("malformed") for turn in turns[:-1]] + [True])
        earned = (config.progress_weight * shares + config.executed_weight * executed).tolist()
        return replace(
            outcome,
            value=outcome.value if config.value == "outcome" else None,
            span_rewards=tuple(SpanReward(turn.start, turn.end, one) for turn, one in zip(turns, earned, strict=True)),
            components={**outcome.components, "outcome": outcome.value, "progress": float(shares.sum())},
        )

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Learn from the outcomes of scored groups; return the estimates' error before that."""
        states = list(self._states(groups))
        scores = [score for group in groups for _, score in group.scored()]
        pairs = [
            (rows.sum(axis=0), score.components["outcome"])
            for rows, score in zip(states, scores, strict=True)
            if score.valid and "outcome" in score.components
        ]
        self.version += 1
        if not pairs:
            return {}
        sums, outcomes = np.stack([total for total, _ in pairs]), np.array([outcome for _, outcome in pairs])
        metrics = {
            "progress/error": float(np.mean((self.head(sums) - outcomes) ** 2)),
            "progress/variance": float(np.var(outcomes)),
        }
        self.head.learn(sums, outcomes)
        return metrics

    def _states(self, groups: Sequence[Group]) -> Any:
        """Yield for each sample [K, D + 1]: the scaled states at the ends of its turns, and a constant 1."""
        from rewards.services.scorer import group_tree

        assert self._scorer is not None
        samples = [sample for group in groups for sample in group.samples]
        hidden = self._scorer.hidden_states([group_tree(group) for group in groups], layers=[-1])
        for sample, rows in zip(samples, hidden, strict=True):
            ends = [turn.end - 1 for turn in sample.turns]
            states = rows[ends, 0].astype(np.float64)
            states /= np.linalg.norm(states, axis=1, keepdims=True) + 1e-12
            yield np.hstack([states, np.ones((len(ends), 1))])

    def state_dict(self) -> Mapping[str, Any]:
        import torch

        learnt = {name: torch.from_numpy(array) for name, array in self.head.sums().items()}
        return {"version": self.version, **learnt}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
        self.head.load({name: tensor.numpy() for name, tensor in state.items() if name != "version"})

    def close(self) -> None:
        self._outcome.close()


class Ridge:
    """The w that minimises the sum of (w . x - y)^2 over all pairs plus ridge |w|^2; 0 before there are any."""

    def __init__(self, ridge: float) -> None:
        self._ridge = ridge
        self._squares: Float64 | None = None
        self._products: Float64 | None = None
        self._weights: Float64 | None = None

    def __call__(self, rows: Float64) -> Float64:
        """[n, D] -> [n]"""
        return np.zeros(len(rows)) if self._weights is None else np.asarray(rows @ self._weights)

    def learn(self, rows: Float64, targets: Float64) -> None:
        """rows [n, D], targets [n]"""
        squares, products = rows.T @ rows, rows.T @ targets
        if self._squares is not None and self._products is not None:
            squares, products = self._squares + squares, self._products + products
        self.load({"squares": squares, "products": products})

    def sums(self) -> dict[str, Float64]:
        if self._squares is None or self._products is None:
            return {}
        return {"squares": self._squares, "products": self._products}

    def load(self, sums: Mapping[str, Float64]) -> None:
        if sums:
            self._squares, self._products = sums["squares"], sums["products"]
            held = self._squares + self._ridge * np.eye(len(self._squares))
            self._weights = np.asarray(np.linalg.solve(held, self._products), dtype=np.float64)
