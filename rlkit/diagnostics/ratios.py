"""Diagnostics of per-token log-ratios, which the learner measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from algorithms.base import LossInputs
from rlkit.diagnostics.base import Diagnostic, DiagnosticConfig, Findings, RunFacts, StepRecord, Windows

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_LOG_RATIO = 20.0


class RatioShift(Diagnostic):
    """Importance ratios pi / pi_old by position and by sign of the advantage (GRPO-Guard, arXiv 2510.22319).

    On samples of the old policy the mean ratio is 1. If it stays below, the upper clip bound hardly ever acts, and
    nothing restrains the policy on rewarded responses.
    """

    SIGNS = ("positive", "negative")
    SUMS = ("tokens", "ratio", "square", "log_ratio", "clipped")
    BELOW, HARDLY_EVER = 0.01, 0.001

    class Config(DiagnosticConfig):
        kind: str = "ratio_shift"
        buckets: int = Field(default=4, ge=1)
        """Number of equal parts of each response with separate rows in the table."""
        steps: int = Field(default=5, ge=1)
        """Steps per window. Warn if the ratio stays low over two windows in a row."""

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(config, settings)
        algorithm = settings["algorithm"]
        self.low, self.high = (algorithm.get(name, 0.2) for name in ("clip_low", "clip_high"))
        self.windows = Windows(config.steps)

    @classmethod
    def objections(cls, config: Any, facts: RunFacts) -> Iterable[str]:
        learner = facts.settings["learner"]
        if learner["minibatches_per_step"] * learner["epochs_per_step"] == 1:
            yield (
                "has no effect: with one optimizer step per training step (learner.minibatches_per_step, "
                "learner.epochs_per_step) every ratio is 1"
            )

    def measure(self, inputs: LossInputs) -> dict[str, Tensor]:
        log_ratio = (inputs.logprobs - inputs.old_logprobs).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        ratio, buckets = log_ratio.exp(), self.config.buckets
        lengths = inputs.sequence.bincount(minlength=inputs.num_sequences)
        first = lengths.cumsum(0) - lengths
        place = inputs.sequence.new_ones(inputs.sequence.shape).cumsum(0) - 1 - first[inputs.sequence]
        bucket = place * buckets // lengths[inputs.sequence]
        sums: dict[str, Tensor] = {}
        for sign, ours, clipped in (
            ("positive", inputs.advantages > 0, ratio > 1 + self.high),
            ("negative", inputs.advantages < 0, ratio < 1 - self.low),
        ):
            weight = inputs.mask * ours
            for name, rows in zip(self.SUMS, (weight, ratio, ratio**2, log_ratio, clipped), strict=True):
                totals = ratio.new_zeros(buckets).index_add(0, bucket, weight * rows if name != "tokens" else weight)
                sums |= {f"{sign}/{b}/{name}": total for b, total in enumerate(totals)}
        return sums

    def check(self, record: StepRecord) -> Findings:
        if not record.measured:
            return Findings()
        cells = {
            (sign, b): {name: record.measured[f"{sign}/{b}/{name}"] for name in self.SUMS}
            for sign in self.SIGNS
            for b in range(self.config.buckets)
        }
        everything = sum(cell["tokens"] for cell in cells.values())
        if not everything:
            return Findings()
        mean = sum(cell["ratio"] for cell in cells.values()) / everything
        square = sum(cell["square"] for cell in cells.values()) / everything
        scalars = {"ratio_shift/mean": mean, "ratio_shift/std": max(0.0, square - mean**2) ** 0.5}
        for sign in self.SIGNS:
            ours = [cell for (own, _), cell in cells.items() if own == sign]
            tokens = sum(cell["tokens"] for cell in ours)
            if tokens:
                scalars[f"ratio_shift/clipped_{sign}"] = sum(cell["clipped"] for cell in ours) / tokens
        table = [
            {
                "advantage": sign,
                "part": b + 1,
                "token_share": cell["tokens"] / everything,
                "mean_ratio": cell["ratio"] / cell["tokens"],
                "variance": max(0.0, cell["square"] / cell["tokens"] - (cell["ratio"] / cell["tokens"]) ** 2),
                "mean_log_ratio": cell["log_ratio"] / cell["tokens"],
                "clipped_share": cell["clipped"] / cell["tokens"],
            }
            for (sign, b), cell in cells.items()
            if cell["tokens"]
        ]
        self.windows.add(scalars)
        return Findings(scalars, table, self._warning())

    def _warning(self) -> str:
        means, clipped = self.windows.change("ratio_shift/mean"), self.windows.change("ratio_shift/clipped_positive")
        if not self.windows.due or means is None or clipped is None:
            return ""
        if max(means) > 1 - self.BELOW or max(clipped) > self.HARDLY_EVER:
            return ""
        self.windows.warned()
        return (
            f"importance ratios stay below 1 (mean {means[1]:.3f} over {self.windows.steps} steps), and only "
            f"{clipped[1]:.2%} of the tokens with a positive advantage are clipped: the upper bound does not restrain "
            "the policy. Lower algorithm.clip_high, learner.learning_rate or learner.minibatches_per_step "
            "(diagnostics/ratio_shift.jsonl shows where in the responses)"
        )

    def state_dict(self) -> dict[str, Any]:
        return self.windows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.windows.load_state_dict(state)


class Drift(Diagnostic):
    """Log-ratios to the reference policy for better and for worse responses. Times beta they are DPO's implicit rewards
    (arXiv 2404.12358), both of which may fall while their margin grows.

    Better and worse are a pair's winner and loser or, without pairs, responses with a positive and with a negative
    advantage.
    """

    FALL = 0.5
    """Smallest fall of the better responses' log-ratio that warns, in nats per response."""

    class Config(DiagnosticConfig):
        kind: str = "drift"
        steps: int = Field(default=10, ge=1)
        """Steps per window. Warn when both log-ratios fall from one window to the next, the better ones' to below 0."""
        max_kl: float | None = Field(default=None, gt=0)
        """Warn when a window's mean log-ratio per token (in nats; the k1 estimate of the KL from the reference) exceeds
        this; null: never."""

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        super().__init__(config, settings)
        self.windows = Windows(config.steps)

    @classmethod
    def objections(cls, config: Any, facts: RunFacts) -> Iterable[str]:
        if not facts.needs.reference_policy or facts.needs.token_kl:
            yield (
                "compares with the reference policy in the loss, which this algorithm does not load there; with "
                "algorithm.kl_coefficient above 0 (a very small one will do) and kl_in=loss it does"
            )

    def measure(self, inputs: LossInputs) -> dict[str, Tensor]:
        if inputs.reference_logprobs is None:
            return {}
        rows = (inputs.logprobs - inputs.reference_logprobs) * inputs.mask
        per_sample = rows.new_zeros(inputs.num_sequences).index_add(0, inputs.sequence, rows)
        if inputs.pairs is not None and len(inputs.pairs):
            better, worse = per_sample[inputs.pairs[:, 0]], per_sample[inputs.pairs[:, 1]]
        else:
            credit = rows.new_zeros(inputs.num_sequences).index_add(0, inputs.sequence, inputs.advantages * inputs.mask)
            better, worse = per_sample[credit > 0], per_sample[credit < 0]
        return {
            "chosen": better.sum(),
            "chosen_samples": rows.new_tensor(len(better)),
            "rejected": worse.sum(),
            "rejected_samples": rows.new_tensor(len(worse)),
            "log_ratio": rows.sum(),
            "tokens": inputs.mask.sum(),
        }

    def check(self, record: StepRecord) -> Findings:
        sums = record.measured
        scalars = {
            f"drift/{name}": sums[total] / sums[count]
            for name, total, count in (
                ("chosen", "chosen", "chosen_samples"),
                ("rejected", "rejected", "rejected_samples"),
                ("kl", "log_ratio", "tokens"),
            )
            if sums.get(count)
        }
        self.windows.add(scalars)
        return Findings(scalars, [scalars] if scalars else [], self._warning())

    def _warning(self) -> str:
        chosen, rejected, kl = (self.windows.change(f"drift/{name}") for name in ("chosen", "rejected", "kl"))
        if not self.windows.due:
            return ""
        steps, most, warnings = self.windows.steps, self.config.max_kl, []
        if chosen and rejected and chosen[1] < min(0.0, chosen[0] - self.FALL) and rejected[1] < rejected[0]:
            warnings.append(
                f"the log-ratio to the reference fell over {2 * steps} steps for better responses ({chosen[0]:.2f} to "
                f"{chosen[1]:.2f} nats) and for worse ones ({rejected[0]:.2f} to {rejected[1]:.2f}): probability moves "
                "to responses that are neither. Add a term for the better ones (an nll term), lower "
                "learner.learning_rate, or strengthen the pull to the reference"
            )
        if most is not None and kl and kl[1] > most:
            warnings.append(
                f"the policy is {kl[1]:.3f} nats per token from the reference on average over {steps} steps, more "
                f"than max_kl={most:g}: raise algorithm.kl_coefficient, or lower learner.learning_rate"
            )
        if warnings:
            self.windows.warned()
        return "; ".join(warnings)

    def state_dict(self) -> dict[str, Any]:
        return self.windows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.windows.load_state_dict(state)
