"""Returns and advantages per token: pure functions of ragged float64 arrays [T_i].

`masks` mark trained tokens. Gaps between them (from a tool or another speaker) are *bridged*: the token after a gap
directly follows the one before it, with one discount. A reward on an unmarked token belongs to the last marked token
before it; a reward before the first one is left out. Results are 0 on unmarked tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from algorithms.functional.advantages import Bool, Float64, Masks, Ragged


class Credit(NamedTuple):
    """Ragged [T_i]."""

    advantages: list[Float64]
    returns: list[Float64]
    """The critic's targets: advantages + values."""


class Whitened(NamedTuple):
    """Values with mean 0 and variance 1 over marked tokens, and the moments that were removed."""

    tokens: list[Float64]
    mean: float
    variance: float


def float64(arrays: Sequence[NDArray[np.floating]]) -> list[Float64]:
    return [np.asarray(array, dtype=np.float64) for array in arrays]


def on_last_token(values: Float64, masks: Masks) -> list[Float64]:
    """values [B] -> ragged: each value on the last marked token, 0 elsewhere."""
    tokens = [np.zeros(len(mask), dtype=np.float64) for mask in masks]
    for value, row, mask in zip(values, tokens, masks, strict=True):
        if mask.any():
            row[np.flatnonzero(mask)[-1]] = value
    return tokens


def reward_to_go(rewards: Ragged, masks: Masks, gamma: float = 1.0) -> list[Float64]:
    """G_t = r_t + gamma G_{t+1} over marked tokens; ragged [T_i] -> ragged [T_i]."""
    acted, where = _actions(rewards, masks)
    return _on_tokens(_reverse_scan(acted, gamma), where, masks)


def gae(rewards: Ragged, values: Ragged, masks: Masks, *, gamma: float, lam: float) -> Credit:
    """Generalised advantage estimation (arXiv 1506.02438 eq. 16), gaps bridged.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the next marked token and
    the value after the last one is 0 (a truncated response counts as ended). rewards, values ragged [T_i]; values on
    unmarked tokens are not read.
    """
    acted, where = _actions(rewards, masks)
    critic = [_at(value, indices) for value, indices in zip(values, where, strict=True)]
    deltas = [reward + gamma * np.append(v[1:], 0.0)[: len(v)] - v for reward, v in zip(acted, critic, strict=True)]
    advantages = _reverse_scan(deltas, gamma * lam)
    targets = [a + v for a, v in zip(advantages, critic, strict=True)]
    return Credit(_on_tokens(advantages, where, masks), _on_tokens(targets, where, masks))


def turn_gae(
    rewards: Ragged, values: Ragged, masks: Masks, ends: Masks, *, gamma: float, lam: float, turn_gamma: float
) -> Credit:
    """GAE over turns, then over the tokens of each turn (bi-level GAE of RAGEN and VAGEN, arXiv 2510.16907).

    e_k is turn k's last marked token, r_k its reward, R_k the sum of the rewards of the turn's tokens before it. Turns:
    delta_k = r_k + turn_gamma (R_{k+1} + V(e_{k+1})) - V(e_k), A_k = delta_k + turn_gamma lam A_{k+1}. Tokens: A_t =
    delta_t + gamma lam A_{t+1} within a turn, A_k at e_k. With gamma = lam = turn_gamma = 1, or one turn, it is `gae`.
    ends ragged [T_i] marks e_k; the last marked token always counts as one. Other arguments as in `gae`. RAGEN's code
    finds turns by non-zero rewards and has no R_k; here a turn that earned 0 counts too, and R_k holds the KL penalty.
    """
    acted, where = _actions(rewards, masks)
    critic = [_at(value, indices) for value, indices in zip(values, where, strict=True)]
    last = [np.flatnonzero(np.append(end[at][:-1], True)[: len(at)]) for end, at in zip(ends, where, strict=True)]
    turns = []
    for reward, v, e in zip(acted, critic, last, strict=True):
        starts = np.append(0, e[:-1] + 1)[: len(e)]
        inner = np.add.reduceat(reward, starts) - reward[e] if len(e) else np.zeros(0)
        turns.append(reward[e] + turn_gamma * np.append((inner + v[e])[1:], 0.0)[: len(e)] - v[e])
    deltas, cut = [], []
    for reward, v, e, turn in zip(acted, critic, last, _reverse_scan(turns, turn_gamma * lam), strict=True):
        delta = reward + gamma * np.append(v[1:], 0.0)[: len(v)] - v
        delta[e] = turn
        deltas += np.split(delta, e[:-1] + 1)
        cut.append(max(len(e), 1))
    scanned = iter(_reverse_scan(deltas, gamma * lam))
    advantages = [np.concatenate([next(scanned) for _ in range(n)]) for n in cut]
    targets = [a + v for a, v in zip(advantages, critic, strict=True)]
    return Credit(_on_tokens(advantages, where, masks), _on_tokens(targets, where, masks))


def whiten(values: Ragged, masks: Masks, keep: Bool, *, ddof: int = 1, epsilon: float = 1e-8) -> Whitened:
    """(x - mean) / sqrt(variance + epsilon) over all marked tokens of kept samples of the *global* batch.

    values ragged, keep [B]. All tokens have the same weight. Unmarked tokens and samples that are not kept get 0; with
    fewer than two different values, all do.
    """
    chosen = [x[m] for x, m, k in zip(values, masks, keep, strict=True) if k]
    flat = np.concatenate(chosen) if chosen else np.zeros(0)
    mean = float(flat.mean()) if len(flat) else 0.0
    equal = len(flat) <= ddof or float(np.ptp(flat)) == 0.0
    variance = 0.0 if equal else float(flat.var(ddof=ddof))
    scale = float(np.sqrt(variance + epsilon))

    def one(x: Float64, mask: Bool, kept: bool) -> Float64:
        if not kept or equal:
            return np.zeros(len(x), dtype=np.float64)
        return np.where(mask, (np.where(mask, x, 0.0) - mean) / scale, 0.0)

    return Whitened([one(x, m, bool(k)) for x, m, k in zip(values, masks, keep, strict=True)], mean, variance)


def reinforce_plus_plus(rewards: Ragged, masks: Masks, keep: Bool, *, gamma: float = 1.0) -> Whitened:
    """REINFORCE++ (arXiv 2501.03262): discounted reward-to-go, whitened over the global batch.

    `rewards` ragged: the outcome on the last token minus each token's KL penalty. keep [B]. The paper's baseline form
    is `whiten(spread(group_relative(..., normalize_by_std=False)))`.
    """
    return whiten(reward_to_go(rewards, masks, gamma), masks, keep)


def explained_variance(values: Ragged, returns: Ragged, masks: Masks, keep: Bool) -> float:
    """1 - Var(return - value) / Var(return) over trained tokens of kept samples; NaN if returns do not vary."""
    chosen = [(v[m], r[m]) for v, r, m, k in zip(values, returns, masks, keep, strict=True) if k]
    if not chosen:
        return float("nan")
    value, target = (np.concatenate(part) for part in zip(*chosen, strict=True))
    if len(target) < 2 or np.ptp(target) == 0:
        return float("nan")
    return float(1.0 - np.var(target - value) / np.var(target))


def _actions(rewards: Ragged, masks: Masks) -> tuple[list[Float64], list[NDArray[np.intp]]]:
    """Per sample: the rewards of marked tokens, each including those of the gap after it, and the tokens' indices."""
    acted, where = [], []
    for reward, mask in zip(rewards, masks, strict=True):
        indices = np.flatnonzero(mask)
        where.append(indices)
        acted.append(np.add.reduceat(np.asarray(reward, dtype=np.float64), indices) if len(indices) else np.zeros(0))
    return acted, where


def _at(values: Float64, indices: NDArray[np.intp]) -> Float64:
    return np.asarray(values, dtype=np.float64)[indices]


def _reverse_scan(rows: Sequence[Float64], factor: float) -> list[Float64]:
    if factor == 1.0:
        return [np.cumsum(row[::-1])[::-1] for row in rows]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    padded = np.zeros((longest + 1, len(rows)), dtype=np.float64)
    for i, row in enumerate(rows):
        padded[: len(row), i] = row
    for t in range(longest - 1, -1, -1):
        padded[t] += factor * padded[t + 1]
    return [padded[:n, i].copy() for i, n in enumerate(lengths)]


def _on_tokens(rows: Sequence[Float64], where: Sequence[NDArray[np.intp]], masks: Masks) -> list[Float64]:
    tokens = [np.zeros(len(mask), dtype=np.float64) for mask in masks]
    for row, indices, values in zip(tokens, where, rows, strict=True):
        row[indices] = values
    return tokens
