"""PRIME's returns (arXiv 2502.01456): process and outcome rewards with separate baselines, combined and whitened.

r_it is the process reward of token t of response i, m_i its mean over trained tokens, a_i the outcome reward, K the
number of valid responses in a group, q_it = log pi_phi - log pi_ref. Process rewards on untrained tokens are ignored;
the outcome is on the last trained token. `prime_rloo` follows one of three codebases:

| | ours (`strict`) | `official` (PRIME-RL/PRIME) | `verl` (recipe/prime) |
|---|---|---|---|
| last token's process reward | kept | kept | set to 0 |
| scores before normalisation | beta q | q | beta q |
| process baseline | the others' token means | K/(K-1) form | K/(K-1) form |
| coefficients outcome : process | explicit | logged, but 1 : 1 in the advantage | 5 : 5, in the advantage |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from algorithms.functional.advantages import (
    Bool,
    Float64,
    Int64,
    Masks,
    Ragged,
    group_relative,
    leave_one_out,
    members_of_groups,
)
from algorithms.functional.returns import on_last_token, reward_to_go, whiten

Normaliser = Literal["none", "global_max_return", "global_std"]
Baseline = Literal["strict", "official"]
Mode = Literal["strict", "official", "verl"]


class Scaled(NamedTuple):
    process: list[Float64]
    divisor: float


class Terms(NamedTuple):
    """Both halves of a return, unweighted. Ragged [T_i]; 0 for samples that are not kept."""

    process: list[Float64]
    outcome: list[Float64]
    keep: Bool
    """[B]"""


class Combined(NamedTuple):
    advantages: list[Float64]
    returns: list[Float64]
    metrics: Mapping[str, float]


def only_trained(process: Ragged, masks: Masks) -> list[Float64]:
    """Process rewards in float64, 0 on untrained tokens (even if NaN there)."""
    return [np.where(m, np.asarray(r, dtype=np.float64), 0.0) for r, m in zip(process, masks, strict=True)]


def token_means(process: Ragged, masks: Masks) -> Float64:
    """m_i [B], 0 if there are no trained tokens."""
    clean = only_trained(process, masks)
    return np.array([r.sum() / max(1, int(m.sum())) for r, m in zip(clean, masks, strict=True)], dtype=np.float64)


def without_last_token(process: Ragged, masks: Masks) -> list[Float64]:
    """Process rewards, with 0 on the last trained token."""
    last = on_last_token(np.ones(len(masks)), masks)
    return [np.where(end > 0, 0.0, r) for r, end in zip(only_trained(process, masks), last, strict=True)]


def normalise(process: Ragged, masks: Masks, keep: Bool, how: Normaliser) -> Scaled:
    """Divide all process rewards of the global batch by one number; keep [B].

    global_max_return: largest |undiscounted process reward-to-go| over trained tokens of kept samples + 1e-6 (the
    official batch norm, made global). global_std: their standard deviation (ddof 1) + 1e-6. none: 1. If no tokens are
    kept, or all rewards are 0, the divisor is 1.
    """
    clean = only_trained(process, masks)
    if how == "none":
        return Scaled(clean, 1.0)
    returns = reward_to_go(clean, masks)
    chosen = [g[m] for g, m, k in zip(returns, masks, keep, strict=True) if k]
    flat = np.concatenate(chosen) if chosen else np.zeros(0)
    if len(flat) < 2 or not flat.any():
        return Scaled(clean, 1.0)
    divisor = float(np.abs(flat).max() if how == "global_max_return" else flat.std(ddof=1)) + 1e-6
    return Scaled([r / divisor for r in clean], divisor)


def rloo(
    process: Ragged,
    outcome: Float64,
    masks: Masks,
    group: Int64,
    valid: Bool,
    *,
    baseline: Baseline = "strict",
    process_gamma: float = 1.0,
    outcome_gamma: float = 1.0,
) -> Terms:
    """Leave-one-out baselines for both halves (the paper's choice).

    strict: p_it = r_it - mean of m_j over the group's other valid responses. official (both codebases): p_it = (K r_it
    - sum_j m_j) / (K - 1), which amplifies variation inside a response by K / (K - 1). Outcome: o_i = a_i - mean of the
    others' a_j. Return: sum over s >= t of process_gamma^(s-t) p_is, and outcome_gamma^(L_i - t) o_i. A sample that is
    alone in its group gets 0 and keep=False.
    """
    means = token_means(process, masks)
    baselined, keep = only_trained(process, masks), np.zeros(len(valid), dtype=np.bool_)
    for members in members_of_groups(valid, group):
        keep[members] = True
        k, total = len(members), means[members].sum()
        for i in members:
            if baseline == "strict":
                credit = baselined[i] - (total - means[i]) / (k - 1)
            else:
                credit = (k * baselined[i] - total) / (k - 1)
            baselined[i] = np.where(masks[i], credit, 0.0)
    advantages, _ = leave_one_out(outcome, valid, group)
    return _terms(baselined, advantages, masks, keep, process_gamma, outcome_gamma)


def grpo(
    process: Ragged,
    outcome: Float64,
    masks: Masks,
    group: Int64,
    valid: Bool,
    *,
    ddof: int = 1,
    epsilon: float = 1e-6,
    process_gamma: float = 1.0,
    outcome_gamma: float = 1.0,
) -> Terms:
    """Group z-scores for both halves (paper eq. 7): (r_it - mean_j m_j) / std_j m_j and (a_i - mean a) / std a.

    The paper leaves `ddof` and `epsilon` open. A half whose values are all equal gives 0.
    """
    means = token_means(process, masks)
    scored, keep = only_trained(process, masks), np.zeros(len(valid), dtype=np.bool_)
    for members in members_of_groups(valid, group):
        keep[members] = True
        mine = means[members]
        equal = np.ptp(mine) == 0.0
        for i in members:
            z = 0.0 if equal else (scored[i] - mine.mean()) / (mine.std(ddof=ddof) + epsilon)
            scored[i] = np.where(masks[i], z, 0.0)
    advantages = np.zeros(len(outcome), dtype=np.float64)
    centred, _ = group_relative(outcome, valid, group, normalize_by_std=False)
    for members in members_of_groups(valid, group):
        if centred[members].any():
            advantages[members] = centred[members] / (outcome[members].std(ddof=ddof) + epsilon)
    return _terms(scored, advantages, masks, keep, process_gamma, outcome_gamma)


def reinforce(
    process: Ragged,
    outcome: Float64,
    masks: Masks,
    group: Int64,
    valid: Bool,
    *,
    process_gamma: float = 1.0,
    outcome_gamma: float = 1.0,
) -> Terms:
    """No baseline (paper eq. 8): sum over s >= t of r_is, and a_i. Every valid sample is kept."""
    rewards = np.where(valid, outcome, 0.0)
    return _terms(only_trained(process, masks), rewards, masks, valid.copy(), process_gamma, outcome_gamma)


def token_rewards(process: Ragged, outcome: Float64, masks: Masks, valid: Bool) -> list[Float64]:
    """r_it, plus a_i on the last trained token; 0 if invalid."""
    ends = on_last_token(np.where(valid, outcome, 0.0), masks)
    summed = [r + end for r, end in zip(only_trained(process, masks), ends, strict=True)]
    return _drop(summed, valid)


def combine(
    terms: Terms, masks: Masks, *, process_coefficient: float, outcome_coefficient: float, whitened: bool = True
) -> Combined:
    """G = process_coefficient x process half + outcome_coefficient x outcome half, whitened over the batch (variance +
    1e-8, ddof 1).

    Metrics: the weighted process half's share of both halves' variances over trained tokens, mean and std of G before
    whitening.
    """
    returns = [
        process_coefficient * p + outcome_coefficient * o for p, o in zip(terms.process, terms.outcome, strict=True)
    ]

    def variance(rows: Ragged) -> float:
        chosen = [row[m] for row, m, k in zip(rows, masks, terms.keep, strict=True) if k]
        return float(np.concatenate(chosen).var()) if chosen else 0.0

    process, outcome = variance(terms.process), variance(terms.outcome)
    process, outcome = process_coefficient**2 * process, outcome_coefficient**2 * outcome
    result = whiten(returns, masks, terms.keep)
    metrics = {
        "prime/process_variance_share": process / (process + outcome) if process + outcome > 0 else 0.0,
        "prime/return_mean": result.mean,
        "prime/return_std": float(np.sqrt(result.variance)),
    }
    return Combined(result.tokens if whitened else returns, returns, metrics)


def length_correlation(returns: Ragged, masks: Masks, keep: Bool) -> float:
    """Correlation between first return and number of trained tokens; NaN if either does not vary."""
    chosen = [(g[m][0], m.sum()) for g, m, k in zip(returns, masks, keep, strict=True) if k and m.any()]
    first, length = np.array(chosen, dtype=np.float64).T if chosen else (np.zeros(0), np.zeros(0))
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(length) == 0:
        return float("nan")
    return float(np.corrcoef(first, length)[0, 1])


def last_token_share(process: Ragged, masks: Masks, keep: Bool) -> float:
    """Share of the summed |process reward| that falls on last trained tokens; NaN if all are 0."""
    rows = [np.abs(r[m]) for r, m, k in zip(process, masks, keep, strict=True) if k and m.any()]
    total = sum(float(row.sum()) for row in rows)
    return sum(float(row[-1]) for row in rows) / total if total > 0 else float("nan")


def _terms(
    process: Ragged, outcome: Float64, masks: Masks, keep: Bool, process_gamma: float, outcome_gamma: float
) -> Terms:
    ends = on_last_token(outcome, masks)
    return Terms(
        _drop(reward_to_go(process, masks, process_gamma), keep),
        _drop(reward_to_go(ends, masks, outcome_gamma), keep),
        keep,
    )


def _drop(rows: Ragged, keep: Bool) -> list[Float64]:
    return [row if kept else np.zeros(len(row), dtype=np.float64) for row, kept in zip(rows, keep, strict=True)]


def prime_rloo(
    log_ratios: Ragged,
    outcome: Float64,
    masks: Masks,
    group: Int64,
    valid: Bool,
    *,
    mode: Mode = "strict",
    beta: float = 0.05,
    normaliser: Normaliser = "global_max_return",
    process_coefficient: float = 1.0,
    outcome_coefficient: float = 1.0,
    process_gamma: float = 1.0,
    outcome_gamma: float = 1.0,
) -> Combined:
    """PRIME's whitened RLOO advantages. log_ratios ragged [T_i]; outcome, group, valid [B].

    Raise ValueError if coefficients are set with `official` or `verl`, or a discount with `verl`.
    """
    if mode != "strict" and (process_coefficient, outcome_coefficient) != (1.0, 1.0):
        raise ValueError(
            f"mode {mode!r} has its own coefficients; leave process_coefficient and outcome_coefficient at 1"
        )
    if mode == "verl" and (process_gamma, outcome_gamma) != (1.0, 1.0):
        raise ValueError("mode 'verl' has no discount; leave process_gamma and outcome_gamma at 1")
    factor = 1.0 if mode == "official" else beta
    scores = [factor * np.asarray(q, dtype=np.float64) for q in log_ratios]
    if mode == "verl":
        scores = without_last_token(scores, masks)
        process_coefficient = outcome_coefficient = 5.0
    baseline: Baseline = "strict" if mode == "strict" else "official"
    _, keep = leave_one_out(outcome, valid, group)
    scaled, _ = normalise(scores, masks, keep, normaliser)
    terms = rloo(
        scaled,
        outcome,
        masks,
        group,
        valid,
        baseline=baseline,
        process_gamma=process_gamma,
        outcome_gamma=outcome_gamma,
    )
    return combine(terms, masks, process_coefficient=process_coefficient, outcome_coefficient=outcome_coefficient)
