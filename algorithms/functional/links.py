"""Links that turn log-ratios into losses of pairs, samples and groups; each is a preference objective (torch).

A *score* is one number per response: the sum or mean over its trained tokens of log pi - log pi_ref, or of log pi where
there is no reference. Links take scores of chosen and rejected responses [P] (h = chosen - rejected) or of samples [S],
`beta` as a number or per pair, and return one loss per pair or sample. sg is the logistic function. Scores are fp32 at
least, because sg saturates. Importing this module does not load torch, so that a configuration can look up a link
cheaply.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# -- pairs -----------------------------------------------------------------------------------------------------


def sigmoid(
    chosen: Tensor,
    rejected: Tensor,
    beta: float | Tensor = 1.0,
    probability: Tensor | None = None,
    margin: float | Tensor = 0.0,
) -> Tensor:
    """-p log sg(z) - (1 - p) log sg(-z) with z = beta h - margin; without `probability` p = 1 (DPO, arXiv 2305.18290).

    p < 1: cDPO (label smoothing), CREAM (arXiv 2410.12735), DNO (arXiv 2404.03715); mean log-probs and a margin: SimPO
    (arXiv 2405.14734); log-probs: CPO (arXiv 2401.08417); margins per pair: ODPO (arXiv 2402.10571).
    """
    logits = beta * (chosen - rejected) - margin
    return -_log_sigmoid(logits) if probability is None else cross_entropy(logits, probability)


def robust(chosen: Tensor, rejected: Tensor, beta: float | Tensor, label_smoothing: float) -> Tensor:
    """[-(1 - e) log sg(beta h) + e log sg(-beta h)] / (1 - 2 e): unbiased under flips of rate e < 1/2 (arXiv
    2403.00409)."""
    logits = beta * (chosen - rejected)
    right, flipped = _log_sigmoid(logits), _log_sigmoid(-logits)
    return (-(1 - label_smoothing) * right + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float | Tensor) -> Tensor:
    """(h - 1 / (2 beta))^2 (arXiv 2310.12036); with mean log-ratios, as the authors confirmed."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(chosen: Tensor, rejected: Tensor, beta: float | Tensor) -> Tensor:
    """max(0, 1 - beta h) (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return (1 - beta * (chosen - rejected)).relu()


def exo(chosen: Tensor, rejected: Tensor, beta: float | Tensor, label_smoothing: float) -> Tensor:
    """KL(sg(beta h) || 1 - e), the reverse of DPO's (arXiv 2402.00856 eq. 16); needs e > 0."""
    logits = beta * (chosen - rejected)
    right = logits.sigmoid() * (_log_sigmoid(logits) - math.log(1 - label_smoothing))
    return right + (-logits).sigmoid() * (_log_sigmoid(-logits) - math.log(label_smoothing))


def nca(chosen: Tensor, rejected: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """-log sg(beta s_w) - log sg(-beta s_w) / 2 - log sg(-beta s_l) / 2 (arXiv 2402.05369)."""
    chosen, rejected = beta * chosen, beta * rejected
    return -_log_sigmoid(chosen) - _log_sigmoid(-chosen) / 2 - _log_sigmoid(-rejected) / 2


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float | Tensor) -> Tensor:
    """1 - sg(beta s_w) + sg(beta s_l): chosen up, rejected down (arXiv 2408.06266)."""
    return 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, beta: float | Tensor) -> Tensor:
    """sg(beta s_w) + 1 - sg(beta h): both down, rejected further (arXiv 2408.06266)."""
    return (beta * chosen).sigmoid() + 1 - (beta * (chosen - rejected)).sigmoid()


def sppo(chosen: Tensor, rejected: Tensor, beta: float | Tensor) -> Tensor:
    """(s_w - 1 / (2 beta))^2 + (s_l + 1 / (2 beta))^2: SPPO with hard labels (arXiv 2405.00675)."""
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def orpo(chosen: Tensor, rejected: Tensor, beta: float | Tensor) -> Tensor:
    """-beta log sg(logit P_w - logit P_l) of mean log-probs, P = exp(mean) (arXiv 2403.07691 eq. 6, 7, added to the
    chosen response's -log pi)."""
    log_odds = (chosen - rejected) - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))
    return -beta * _log_sigmoid(log_odds)


def rdp(
    chosen: Tensor,
    rejected: Tensor,
    beta: float | Tensor,
    gain: Tensor,
    old_chosen: Tensor | None = None,
    old_rejected: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """(h - gain / beta)^2, `gain` = R_w - R_l [P] (PRDP, arXiv 2402.08714). With `clip`: the larger of this and the
    same with scores clipped to within `clip` of those from before the step."""
    target = gain / beta
    plain = (chosen - rejected - target) ** 2
    if clip is None or old_chosen is None or old_rejected is None:
        return plain
    near = chosen.clamp(old_chosen - clip, old_chosen + clip) - rejected.clamp(old_rejected - clip, old_rejected + clip)
    return plain.maximum((near - target) ** 2)


def copg(chosen: Tensor, rejected: Tensor, beta: float | Tensor, gain: Tensor) -> Tensor:
    """-(gain - beta h / 2) h, `gain` = R_w - R_l [P] (CoPG, arXiv 2406.19185); minimal where R - beta log-ratio is
    equal for both. Equals beta / 2 x `rdp`, up to a constant."""
    ratio = chosen - rejected
    return -(gain - beta / 2 * ratio) * ratio


# -- samples and groups ----------------------------------------------------------------------------------------


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """-l log sg(s) - (1 - l) log sg(-s), [S]; labels in [0, 1] may be soft."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    scores = _wide(scores)
    return binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")


def kto(
    scores: Tensor,
    labels: Tensor,
    baseline: float | Tensor,
    beta: float = 1.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w_D (1 - sg(beta (s - z))) where l = 1, w_U (1 - sg(beta (z - s))) where l = 0; [S] (arXiv 2402.01306 eq. 8).

    Soft labels [S] mix the two. `baseline` z: `kto_baseline`, without gradient. z = 0: APO-zero, unpaired.
    """
    margin = beta * (_wide(scores) - baseline)
    labels = labels.to(margin.dtype)
    return desirable_weight * labels * (-margin).sigmoid() + undesirable_weight * (1 - labels) * margin.sigmoid()


def kto_baseline(mismatched_scores: Tensor) -> Tensor:
    """z = max(0, mean s) over responses paired with *other* prompts, detached; average the mean over ranks first."""
    return _wide(mismatched_scores).mean().clamp(min=0.0).detach()


def bco(scores: Tensor, labels: Tensor, shift: float | Tensor, beta: float) -> Tensor:
    """Cross-entropy of sg(beta (s - shift)) with the labels, [S] (arXiv 2404.04656). `shift`: halfway between the mean
    scores of desirable and undesirable responses, without gradient."""
    return cross_entropy(beta * (scores - shift), labels)


def less_others(scores: Tensor, group: Tensor) -> Tensor:
    """psi [S]: each score minus the mean of the other scores in its group [S]; 0 if it is the only one. The gradient
    also flows through the mean."""
    zeros = scores.new_zeros(int(group.max()) + 1)
    total = zeros.index_add(0, group, scores)[group]
    count = zeros.index_add(0, group, scores.new_ones(len(scores)))[group]
    return (scores - (total - scores) / (count - 1).clamp(min=1)).where(count > 1, 0.0)


def class_weights(labels: Tensor, group: Tensor) -> Tensor:
    """[S] samples of the group / (2 x those with the same label, 0 or 1); 1 in a group with one class."""
    zeros = labels.new_zeros(int(group.max()) + 1)
    count = zeros.index_add(0, group, labels.new_ones(len(labels)))[group]
    right = zeros.index_add(0, group, labels)[group]
    same = right.where(labels > 0.5, count - right)
    return (count / (2 * same)).where(same < count, 1.0)


def pacs(scores: Tensor, labels: Tensor, group: Tensor, beta: float, weights: float | Tensor = 1.0) -> Tensor:
    """Cross-entropy of psi = beta (s - mean of the group's others) with the labels 0 or 1, [S] (arXiv 2509.02522).

    Scores are log-ratios to the policy before the step; groups must be complete.
    """
    return weights * cross_entropy(beta * less_others(scores, group), labels)


# -- terms added to a link, and weights ------------------------------------------------------------------------


def tgdpo_weights(guide_ratios: Tensor, beta: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Token weights [R] of chosen and of rejected responses: 1 + alpha beta q and 1 - alpha beta q, q = log guide - log
    pi_ref (TGDPO, arXiv 2506.14574); alpha = 0 is DPO."""
    shift = alpha * beta * guide_ratios
    return 1 + shift, 1 - shift


def treg_rewards(better_logprobs: Tensor, worse_logprobs: Tensor) -> Tensor:
    """h [R] = sg(log-prob under a prompt that asks for a better answer - under one for a worse) - 1/2 (T-REG, arXiv
    2412.02685)."""
    return (better_logprobs - worse_logprobs).sigmoid() - 0.5


def treg(chosen: Tensor, rejected: Tensor, beta: float, chosen_term: Tensor, rejected_term: Tensor) -> Tensor:
    """T-REG's regulariser per pair: sg(beta (s_l - s_w)), detached, x the sum of both terms [P], each -beta x sum of h
    log pi over a response's tokens."""
    return (beta * (rejected - chosen)).sigmoid().detach() * (chosen_term + rejected_term)


def wpo_weights(chosen_logprobs: Tensor, rejected_logprobs: Tensor) -> Tensor:
    """min(1, exp(mean log pi of chosen + of rejected)) [P], detached: pairs count by how likely the policy is to sample
    them (WPO, arXiv 2406.11827)."""
    return (chosen_logprobs + rejected_logprobs).exp().clamp(max=1.0).detach()


# -- from tokens to scores ---------------------------------------------------------------------------------------


def sample_sums(rows: Tensor, mask: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """[R] -> [S] sums over rows with a mask above 0; the values of other rows do not matter."""
    kept = _wide(rows).where(mask > 0, 0.0)
    return kept.new_zeros(num_sequences).index_add(0, sequence, kept)


def first_sums(rows: Tensor, mask: Tensor, sequence: Tensor, samples: Tensor, count: Tensor) -> Tensor:
    """[P] sums over the first `count` [P] trained rows of `samples` [P]; the rows [R] of a sample are contiguous."""
    from torch import searchsorted

    kept = mask > 0
    trained, sums = kept.cumsum(0), rows.double().where(kept, 0.0).cumsum(0)
    counts = sequence.new_zeros(int(sequence.max()) + 2).index_add(0, sequence + 1, kept.long())
    before = counts.cumsum(0)[samples]

    def up_to(tokens: Tensor) -> Tensor:
        return sums[searchsorted(trained, tokens)].where(tokens > 0, 0.0)

    return (up_to(before + count) - up_to(before)).to(rows.dtype)


def correct_incorrect_pairs(labels: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (chosen, rejected) [P] of all pairs within a group with labels chosen > rejected; labels, group [S]."""
    better = (labels[:, None] > labels[None, :]) & (group[:, None] == group[None, :])
    chosen, rejected = better.nonzero(as_tuple=True)
    return chosen, rejected


def _log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(_wide(values))


def _log_one_minus_exp(logprob: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0; x is capped at -1e-7, beyond which an almost certain response gives infinity."""
    return (-logprob.clamp(max=-1e-7).expm1()).log()


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype.itemsize < 4 else values
