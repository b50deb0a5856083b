"""PRIME's advantages as each codebase computes them, from the implicit PRM's log-ratios. For comparison and tests.

q_it = log pi_phi - log pi_ref of token t of response i. The process reward is beta q; what each does with it differs:

| | ours (`strict`) | `official` (PRIME-RL/PRIME) | `verl` (recipe/prime) |
|---|---|---|---|
| last token's process reward | kept | kept | set to 0 |
| scores before normalisation | beta q | q | beta q |
| process baseline | the others' token means | K/(K-1) form | K/(K-1) form |
| coefficients outcome : process | explicit | logged, but 1 : 1 in the advantage | 5 : 5, in the advantage |
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from algorithms.advantages import Bool, Float64, Int64, leave_one_out
from algorithms.prime_returns import Baseline, Combined, Normaliser, combine, normalise, rloo, without_last_token
from algorithms.returns import Masks, Ragged

Mode = Literal["strict", "official", "verl"]


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

    `official` and `verl` have coefficients of their own: giving others with them raises ValueError, and so does a
    discount with `verl`. A group needs two valid samples (the official code divides by zero).
    """
    if mode != "strict" and (process_coefficient, outcome_coefficient) != (1.0, 1.0):
        raise ValueError(f"mode {mode!r} has its own coefficients; leave process_coefficient and outcome_coefficient")
    if mode == "verl" and (process_gamma, outcome_gamma) != (1.0, 1.0):
        raise ValueError("mode 'verl' knows no discount; leave process_gamma and outcome_gamma at 1")
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
