"""Measures an implicit PRM on labelled responses: outcomes, choice among responses, first wrong steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from algorithms.functional.selection import (
    ProcessBench,
    best_of_n,
    best_threshold,
    brier,
    calibration_error,
    majority,
    pair_accuracy,
    process_bench,
    sigmoid,
    sign_accuracy,
    subsets,
    vote,
)
from rewards.implicit_prm.learner import Encoded
from rewards.implicit_prm.steps import aggregate, step_scores
from rewards.verifiers.answers import final_answer

MOST_SUBSETS = 64
"""Most subsets of a prompt's responses, for each N."""


def outcome_metrics(encoded: Sequence[Encoded], ratios: Sequence[np.ndarray], beta: float) -> dict[str, float]:
    """Measure s = beta * sum q against the labels.

    A model equal to its reference has cross_entropy ln 2 and brier 0.25. pair_accuracy is over pairs of responses to
    one prompt with different labels (absent if there are none).
    """
    scores = np.array([beta * float(q.sum(dtype=np.float64)) for q in ratios])
    labels = np.array([one.rollout.label for one in encoded], dtype=np.float64)
    valid = np.ones(len(scores), dtype=np.bool_)
    metrics = {
        "cross_entropy": float((np.logaddexp(0.0, scores) - labels * scores).mean()),
        "sign_accuracy": sign_accuracy(scores, labels, valid),
        "brier": brier(scores, labels),
        "calibration_error": calibration_error(scores, labels),
        "score_mean": float(scores.mean()),
        "score_p95": float(np.quantile(np.abs(scores), 0.95)),
    }
    group = _group_numbers(encoded)
    mixed = [g for g in np.unique(group) if np.ptp(labels[group == g]) > 0]
    if mixed:
        metrics["pair_accuracy"] = float(pair_accuracy(scores, labels, group, np.isin(group, mixed)).mean())
    return metrics


def selection_accuracy(
    encoded: Sequence[Encoded], ratios: Sequence[np.ndarray], coefficient: float, seed: int
) -> dict[int, dict[str, float]]:
    """Return N -> way of choosing one of N responses -> mean label of the chosen response, for N = 1, 2, 4, ...

    The mean is over subsets of N responses of each prompt, and over prompts (`prompts` is their number). random,
    oracle, majority and shortest do not need a model.
    """
    group = _group_numbers(encoded)
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    labels = np.array([one.rollout.label for one in encoded])
    answers = [_answer(one.rollout.response) for one in encoded]
    single = [step_scores(q, one.steps, coefficient) for one, q in zip(encoded, ratios, strict=True)]
    scores = {
        "response score": np.array([aggregate(steps, "sum") for steps in single]),
        "worst step": np.array([aggregate(steps, "min") for steps in single]),
        "mean step": np.array([aggregate(steps, "mean") for steps in single]),
    }
    lengths = np.array([len(one.response) for one in encoded], dtype=np.float64)
    largest = max(len(m) for m in members)
    sizes = [2**i for i in range(largest.bit_length())]
    table: dict[int, dict[str, float]] = {}
    for n in sizes:
        rows: dict[str, list[float]] = {}
        enough = [m for m in members if len(m) >= n]
        for m in enough:
            for name, value in _one_prompt(m, n, labels, answers, lengths, scores, seed).items():
                rows.setdefault(name, []).append(value)
        table[n] = {name: float(np.mean(values)) for name, values in rows.items()} | {"prompts": float(len(enough))}
    return table


def _one_prompt(
    members: np.ndarray,
    n: int,
    labels: np.ndarray,
    answers: Sequence[str | None],
    lengths: np.ndarray,
    scores: Mapping[str, np.ndarray],
    seed: int,
) -> dict[str, float]:
    results: dict[str, list[float]] = {}
    for subset in subsets(len(members), n, MOST_SUBSETS, seed):
        chosen = members[list(subset)]
        texts = [answers[i] for i in chosen]
        picks = {"majority": majority(texts), "shortest": best_of_n(-lengths[chosen])}
        for name, values in scores.items():
            picks[f"best by {name}"] = best_of_n(values[chosen])
            picks[f"vote by {name}"] = vote(texts, sigmoid(values[chosen]))
        results.setdefault("random", []).append(float(labels[chosen].mean()))
        results.setdefault("oracle", []).append(float(labels[chosen].max()))
        for name, index in picks.items():
            results.setdefault(name, []).append(float(labels[chosen[index]]))
    return {name: float(np.mean(values)) for name, values in results.items()}


def first_error_result(
    encoded: Sequence[Encoded], ratios: Sequence[np.ndarray], coefficient: float, threshold: float | None
) -> ProcessBench | None:
    """Return ProcessBench results for responses with a known first wrong step; None if there are none.

    Without a threshold, use the one that is best for these same responses.
    """
    known = [(one, q) for one, q in zip(encoded, ratios, strict=True) if one.rollout.first_error is not None]
    if not known:
        return None
    cumulative = [step_scores(q, one.steps, coefficient, "cumulative") for one, q in known]
    labels = np.array([one.rollout.first_error for one, _ in known], dtype=np.int64)
    if threshold is None:
        return best_threshold(cumulative, labels)
    return process_bench(cumulative, labels, threshold)


def selection_table(table: Mapping[int, Mapping[str, float]]) -> str:
    names = [name for name in next(iter(table.values())) if name != "prompts"]
    width = max(len(name) for name in names)
    head = f"{'accuracy of one of N, %':<{max(width, 24)}}" + "".join(f"{f'N={n}':>8}" for n in table)
    lines = [head]
    for name in names:
        lines.append(f"{name:<{max(width, 24)}}" + "".join(f"{100 * row[name]:8.1f}" for row in table.values()))
    lines.append(f"{'prompts':<{max(width, 24)}}" + "".join(f"{row['prompts']:8.0f}" for row in table.values()))
    return "\n".join(lines)


def sample_rows(encoded: Sequence[Encoded], ratios: Sequence[np.ndarray], beta: float) -> list[dict[str, Any]]:
    return [
        {
            "origin": one.rollout.origin,
            "group": one.rollout.group,
            "response": one.rollout.response,
            "label": one.rollout.label,
            "score": beta * float(q.sum(dtype=np.float64)),
            "steps": step_scores(q, one.steps, beta).tolist(),
        }
        for one, q in zip(encoded, ratios, strict=True)
    ]


def _answer(response: str) -> str | None:
    answer = final_answer(response, accept_last_number=True)
    return None if answer is None else answer.text


def _group_numbers(encoded: Sequence[Encoded]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(one.rollout.group, len(numbers)) for one in encoded], dtype=np.int64)
