"""What is watched while the implicit PRM learns: how well it ranks and predicts outcomes that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from algorithms.prm_metrics import brier, calibration_error, pair_accuracy, sign_accuracy
from rlkit.experience import Group


def labels_of(groups: Sequence[Group]) -> list[float | None]:
    """Outcome in 0 to 1 of every sample, None where it is invalid or has no trained token."""
    return [
        min(1.0, max(0.0, score.value)) if score.valid and score.value is not None and sample.trained.any() else None
        for group in groups
        for sample, score in group.scored()
    ]


def before_update(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics `prm/...` of the scores that these groups carry: from before the update, so a true generalisation."""
    scores = np.array([score.components.get("implicit_prm", 0.0) for group in groups for _, score in group.scored()])
    labels, valid, group = _arrays(groups)
    metrics = {"prm/sign_accuracy": sign_accuracy(scores, labels, valid)} | _pairs(
        "prm/pair_accuracy", scores, labels, valid, group
    )
    if valid.any():
        metrics |= {
            "prm/score_mean": float(scores[valid].mean()),
            "prm/score_p95": float(np.quantile(np.abs(scores[valid]), 0.95)),
            "prm/brier": brier(scores[valid], labels[valid]),
            "prm/calibration_error": calibration_error(scores[valid], labels[valid]),
        }
    return metrics


class HeldOut:
    """Groups of the first steps, kept away from training: the model is judged on them at every update."""

    LARGEST_SHARE = 0.25

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.groups: list[Group] = []

    def set_aside(self, groups: Sequence[Group]) -> list[Group]:
        """Keep some groups with differing outcomes while more are wanted; returns those to train on."""
        room = min(self.wanted - len(self.groups), int(self.LARGEST_SHARE * len(groups)))
        taken = [group for group in groups if _differ(group)][:room] if room > 0 else []
        # Only tokens and scores are looked at again, and data columns may be anything: they are not kept.
        self.groups += [replace(group, prompt=replace(group.prompt, columns={})) for group in taken]
        kept = {group.id for group in taken}
        return [group for group in groups if group.id not in kept]

    def metrics(self, token_rewards: Sequence[np.ndarray]) -> dict[str, float]:
        """`prm/heldout_pair_accuracy` of the present model's token rewards of all samples of `groups`."""
        scores = np.array([float(rewards.sum()) for rewards in token_rewards])
        labels, valid, group = _arrays(self.groups)
        return _pairs("prm/heldout_pair_accuracy", scores, labels, valid, group)


def _differ(group: Group) -> bool:
    labels = [label for label in labels_of([group]) if label is not None]
    return len(set(labels)) > 1


def _arrays(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = labels_of(groups)
    valid = np.array([label is not None for label in found], dtype=np.bool_)
    labels = np.array([label or 0.0 for label in found], dtype=np.float64)
    return labels, valid, np.array([g for g, group in enumerate(groups) for _ in group.samples], dtype=np.int64)


def _pairs(
    metric: str, scores: np.ndarray, labels: np.ndarray, valid: np.ndarray, group: np.ndarray
) -> dict[str, float]:
    """Pair accuracy over the groups whose outcomes differ; nothing if there are none."""
    mixed = [g for g in np.unique(group[valid]) if np.ptp(labels[valid & (group == g)]) > 0]
    if not mixed:
        return {}
    accuracy = float(pair_accuracy(scores, labels, group, valid & np.isin(group, mixed)).mean())
    return {metric: accuracy}
