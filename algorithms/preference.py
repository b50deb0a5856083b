"""Learning from preferences, labels or scores of whole responses, through one link (DPO and its kin).

A score s is the sum or mean over a response's trained tokens of log pi - log pi_ref. The link (`functional/links.py`)
turns the scores of a better and a worse response, of one response with a label, or of a whole group into a loss. The
recipes of conf/algorithm are settings of this.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from algorithms.base import (
    POLICY,
    REFERENCE,
    Advantages,
    Algorithm,
    AlgorithmNeeds,
    Experience,
    FloatArray,
    LossInputs,
    LossOutput,
    Pass,
    Render,
)
from algorithms.functional import links, losses
from algorithms.functional.advantages import Bool, Float64, Masks, Outcomes, members_of_groups
from algorithms.functional.pairs import Compared, consistency, dynamic_beta
from algorithms.functional.prompts import mismatched, with_wish
from algorithms.functional.scores import BETTER, GUIDE, WORSE, Scores, summed
from algorithms.functional.selection import sigmoid
from algorithms.preference_config import OPTIONS, PreferenceConfig, find_link, link_parameters
from rlkit.experience import Group, UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
OF_POLICY, OF_REFERENCE = "own_policy", "own_reference"
MISMATCHED_POLICY, MISMATCHED_REFERENCE = "mismatched_policy", "mismatched_reference"
OTHER_PROMPTS = (MISMATCHED_POLICY, MISMATCHED_REFERENCE, BETTER, WORSE)
"""Names of passes."""
FIRST_LOSS_TOLERANCE = 0.01
"""Relative to the theoretical loss of a policy that equals its reference, absolute if that is below 1; rounding errors
are far smaller."""


class Preference(Algorithm):
    Config = PreferenceConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._link, self._takes = find_link(config.link), link_parameters(config.link)

    def needs(self) -> AlgorithmNeeds:
        config, takes = self.config, self._takes
        models: dict[str, str] = {}
        if config.labels == "agreement" or "shift" in takes:
            models |= {OF_POLICY: POLICY, OF_REFERENCE: REFERENCE}
        if "baseline" in takes:
            models |= {MISMATCHED_POLICY: POLICY, MISMATCHED_REFERENCE: REFERENCE}
        if config.guide is not None:
            models[GUIDE] = config.guide
        if config.token_reward_coefficient:
            models |= {BETTER: REFERENCE, WORSE: REFERENCE}
        compares = config.of_pairs or "group" in takes
        return AlgorithmNeeds(
            sources=("policy", "data", "model"),
            rewards=config.labels != "agreement",
            pairs=config.of_pairs and config.labels != "agreement",
            reference_policy=config.reference == "frozen",
            labels=not config.of_pairs,
            min_samples_per_prompt=2 if compares else 1,
            min_prompts_per_step=2 if "baseline" in takes else 1,
            layout="pairs" if config.of_pairs else "full_group" if compares else "any",
            passes={name: Pass(model, other_prompts=name in OTHER_PROMPTS) for name, model in models.items()},
            corrects_staleness=True,  # pairs need not come from the policy
        )

    def normalises(self) -> bool:
        config = self.config
        by_size = "gain" in self._takes or config.labels == "gain" or config.dynamic_beta > 0
        return config.of_pairs and not by_size

    def groups_for(self, name: str, groups: Sequence[Group], render: Render) -> Sequence[Group]:
        if name in (MISMATCHED_POLICY, MISMATCHED_REFERENCE):
            return mismatched(groups)
        if name in (BETTER, WORSE):
            wish = self.config.better_prompt if name == BETTER else self.config.worse_prompt
            return [with_wish(group, wish, render) for group in groups]
        return groups

    # -- what is compared ------------------------------------------------------------------------------------------

    def advantages(self, experience: Experience) -> Advantages:
        advantages = self._compared(experience) if self.config.of_pairs else self._labelled(experience)
        extras = {name: experience.logprobs[name] for name in (GUIDE, BETTER, WORSE) if name in experience.logprobs}
        first = {"first": 1.0} if experience.step == 1 and self.config.reference == "frozen" else {}
        return replace(advantages, extras=extras, scalars={**advantages.scalars, **first})

    def _compared(self, experience: Experience) -> Advantages:
        compared, agreement = self._pairs(experience)
        lengths = np.array([int(s.trained.sum()) for group in experience.groups for s in group.samples], np.float64)
        keep = np.zeros(len(lengths), dtype=np.bool_)
        keep[compared.samples] = True
        group = np.repeat(np.arange(len(experience.groups)), [len(g.samples) for g in experience.groups])
        metrics = {
            "preference/pairs": float(len(compared.samples)),
            "preference/paired_share": len(np.unique(group[keep])) / max(1, len(experience.groups)),
            **agreement,
        }
        if len(compared.samples):
            better, worse = lengths[compared.samples].mean(axis=0)
            metrics |= {"preference/chosen_length": float(better), "preference/rejected_length": float(worse)}
            metrics["preference/gain"] = float(compared.gain.mean())
        return Advantages(
            tokens=[np.zeros(len(s), np.float32) for g in experience.groups for s in g.samples],
            keep=keep,
            pairs=compared.samples,
            pair_values=self._pair_values(compared),
            metrics=metrics,
        )

    def _pairs(self, experience: Experience) -> tuple[Compared, dict[str, float]]:
        """Pair the samples. Raise UserError if the scores have no preferences to read, or have margins that the link
        ignores."""
        config, groups = self.config, experience.groups
        if config.labels == "agreement":
            return self._self_ranked(experience)
        outcomes = Outcomes.of(experience)
        compared = self._by_scores(groups, outcomes)
        if config.pairs == "judge" and outcomes.valid.any() and not any(g.scores and g.scores.pairs for g in groups):
            raise UserError(
                "algorithm.pairs=judge: neither the data nor the reward compares responses; use a reward that does "
                "(reward=judge reward.mode=pairwise), or algorithm.pairs=best_worst"
            )
        if compared.margin.any() and not self._takes & {"margin", "gain"} and not config.dynamic_beta:
            raise UserError(
                f"algorithm.link={config.link} takes no margins, but the data have some; leave data.margin_column null"
            )
        return compared, {}

    def _by_scores(self, groups: Sequence[Group], outcomes: Outcomes) -> Compared:
        by_gain = self.config.labels == "gain"
        ties = by_gain or "gain" in self._takes  # ties carry information, too
        compared = Compared.of(groups, outcomes.rewards, outcomes.valid, self.config.pairs, ties)
        if by_gain:
            return replace(compared, probability=sigmoid(compared.gain))
        return compared if "probability" in self._takes else compared.where(compared.probability > 0.5)

    def _self_ranked(self, experience: Experience) -> tuple[Compared, dict[str, float]]:
        """CREAM: best and worst by the policy's mean log-probs; probability: how closely the reference's ranking
        agrees."""
        groups = experience.groups
        masks = [sample.trained for group in groups for sample in group.samples]
        judged = [np.ones(len(g.samples), dtype=np.bool_) if g.scores is None else g.valid for g in groups]
        valid = np.concatenate(judged) & np.array([mask.any() for mask in masks], dtype=np.bool_)
        group = np.repeat(np.arange(len(groups)), [len(g.samples) for g in groups])
        mine, theirs = (summed(experience.logprobs[name], masks, True) for name in (OF_POLICY, OF_REFERENCE))
        alike = [consistency(mine[members], theirs[members]) for members in members_of_groups(valid, group)]
        mean = float(np.mean(alike)) if alike else 1.0
        compared = Compared.of(groups, mine, valid, "best_worst")
        probability = np.full(len(compared.samples), mean)
        return replace(compared, probability=probability), {"preference/agreement": mean}

    def _pair_values(self, compared: Compared) -> dict[str, FloatArray]:
        config, smoothing = self.config, self.config.label_smoothing
        values: dict[str, Float64] = {"weight": compared.weight}
        if "probability" in self._takes:
            p = compared.probability
            values["probability"] = p * (1 - smoothing) + (1 - p) * smoothing
        if config.dynamic_beta:
            values["beta"] = dynamic_beta(compared.gain, config.beta, config.dynamic_beta, config.dynamic_beta_rate)
        elif "margin" in self._takes:
            values["margin"] = compared.margin + config.target_margin
        if "gain" in self._takes:
            values["gain"] = compared.gain
        return {name: value.astype(np.float32) for name, value in values.items()}

    def _labelled(self, experience: Experience) -> Advantages:
        outcomes = Outcomes.of(experience)
        labels, keep = outcomes.rewards, outcomes.valid
        if ((labels < 0) | (labels > 1)).any():
            raise UserError(
                f"algorithm.link={self.config.link} learns from labels between 0 (bad) and 1 (good), but there is a "
                f"score of {labels[(labels < 0) | (labels > 1)][0]:g}; use a link for pairs (link=sigmoid), or a "
                "reward that judges answers right or wrong"
            )
        if "group" in self._takes:
            keep = np.zeros_like(keep)
            for members in members_of_groups(outcomes.valid, outcomes.group):
                keep[members] = True
        good = float(labels[keep].mean()) if keep.any() else 0.0
        weight = np.array([s.weight for group in experience.groups for s in group.samples], np.float32)
        scalars = {"good_share": good, **self._baselines(experience, labels, keep)}
        return Advantages(
            tokens=[np.zeros(len(mask), np.float32) for mask in outcomes.masks],
            keep=keep,
            samples={"labels": labels.astype(np.float32), "weight": weight},
            scalars=scalars,
            metrics={f"preference/{name}": value for name, value in scalars.items()},
        )

    def _baselines(self, experience: Experience, labels: Float64, keep: Bool) -> dict[str, float]:
        """KTO's z or BCO's shift over the whole step, in nats, so that it does not depend on the micro-batch."""
        logprobs = experience.logprobs
        if MISMATCHED_POLICY in logprobs:
            masks = [sample.trained for group in mismatched(experience.groups) for sample in group.samples]
            scores = self._log_ratios(logprobs[MISMATCHED_POLICY], logprobs[MISMATCHED_REFERENCE], masks)
            return {"baseline": max(0.0, float(scores.mean()))}
        if OF_POLICY not in logprobs:
            return {}
        masks = [sample.trained for group in experience.groups for sample in group.samples]
        scores = self._log_ratios(logprobs[OF_POLICY], logprobs[OF_REFERENCE], masks)
        halves = [scores[keep & side].mean() for side in (labels > 0.5, labels <= 0.5) if (keep & side).any()]
        return {"shift": float(np.mean(halves)) if len(halves) == 2 else 0.0}

    def _log_ratios(self, policy: Sequence[FloatArray], reference: Sequence[FloatArray], masks: Masks) -> Float64:
        """[B] log-ratios, summed or averaged as in the loss."""
        normalised = self.config.length_normalised
        return summed(policy, masks, normalised) - summed(reference, masks, normalised)

    # -- the loss --------------------------------------------------------------------------------------------------

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Return the mean over pairs of weight x (link + terms), or the mean over samples of weight x link."""
        scores = Scores(inputs, self.config)
        output = self._pair_loss(inputs, scores) if self.config.of_pairs else self._sample_loss(inputs, scores)
        sums = dict(output.sums)
        share = inputs.mask / inputs.denominators.measured
        sums["policy/entropy"] = (inputs.entropy.detach() * share).sum()
        if inputs.reference_logprobs is not None:
            # k3 explodes on recorded responses that the policy may no longer sample.
            divergence = losses.kl_divergence(inputs.logprobs.detach(), inputs.reference_logprobs, "k2")
            sums["kl/reference"] = (divergence * share).sum()
        return replace(output, sums=sums)

    def _pair_loss(self, inputs: LossInputs, scores: Scores) -> LossOutput:
        config, values = self.config, inputs.pair_values
        if inputs.pairs is None or not len(inputs.pairs):
            return LossOutput(inputs.logprobs.sum() * 0.0)
        better, worse = inputs.pairs.unbind(1)
        chosen, rejected = scores.sides(inputs.logprobs, better, worse)
        arguments = {"beta": config.beta, **values}
        if "clip" in self._takes and config.clip is not None:
            old_chosen, old_rejected = scores.sides(inputs.old_logprobs, better, worse)
            arguments |= {"old_chosen": old_chosen, "old_rejected": old_rejected}
        linked = self._linked(arguments, chosen=chosen, rejected=rejected)
        total, likely = linked, scores.mean_logprobs()
        if config.nll_coefficient:
            total = total - config.nll_coefficient * likely[better]
        if config.token_reward_coefficient:
            terms = scores.sums(-config.beta * scores.token_rewards() * inputs.logprobs)
            regulariser = links.treg(chosen, rejected, config.beta, terms[better], terms[worse])
            total = total + config.token_reward_coefficient * regulariser
        weight = values["weight"]
        if config.on_policy_weights:
            weight = weight * links.wpo_weights(likely[better], likely[worse])

        def mean(per_pair: Tensor) -> Tensor:
            return per_pair.sum() / inputs.denominators.pairs

        gap, beta = (chosen - rejected).detach(), arguments["beta"]
        right = (gap.sign() + 1) / 2
        for name, undecided in (("gain", 0.0), ("probability", 0.5)):
            if name in values:
                right = right.where(values[name] != undecided, 0.5)
        sums = {
            "preference/loss": mean(weight * linked.detach()),
            "preference/accuracy": mean(right),
            "preference/margin": mean(beta * gap),
            "preference/chosen_reward": mean(beta * chosen.detach()),
            "preference/rejected_reward": mean(beta * rejected.detach()),
            "preference/chosen_logprob": mean(likely[better].detach()),
            "preference/rejected_logprob": mean(likely[worse].detach()),
        }
        if "first" in inputs.scalars:
            at_start = self._linked(arguments, chosen=chosen.detach() * 0, rejected=rejected.detach() * 0)
            sums["preference/loss_at_start"] = mean(weight * at_start)
        return LossOutput(mean(weight * total), sums)

    def _sample_loss(self, inputs: LossInputs, scores: Scores) -> LossOutput:
        labels, s = inputs.samples["labels"], scores.of(inputs.logprobs)
        arguments: dict[str, Any] = {"labels": labels, "group": inputs.group, "beta": self.config.beta}
        arguments |= {name: inputs.scalars[name] for name in ("baseline", "shift") if name in inputs.scalars}
        if self.config.balance_classes:
            arguments["weights"] = links.class_weights(labels, inputs.group)
        linked = self._linked(arguments, scores=s)
        likely, good_share = scores.mean_logprobs().detach(), inputs.scalars["good_share"]

        def mean(per_sample: Tensor) -> Tensor:
            return per_sample.sum() / inputs.denominators.sequences

        weight = inputs.samples["weight"]
        sums = {"preference/loss": mean(weight * linked.detach())}
        for side, of_side, share in (("chosen", labels, good_share), ("rejected", 1 - labels, 1 - good_share)):
            if share:
                sums[f"preference/{side}_reward"] = mean(of_side * self.config.beta * s.detach()) / share
                sums[f"preference/{side}_logprob"] = mean(of_side * likely) / share
        if "first" in inputs.scalars:
            sums["preference/loss_at_start"] = mean(weight * self._linked(arguments, scores=s.detach() * 0))
        return LossOutput(mean(weight * linked), sums)

    def _linked(self, arguments: Mapping[str, Any], **scores: Tensor) -> Tensor:
        options = {name: getattr(self.config, name) for name in OPTIONS & self._takes}
        known = {**options, **{name: value for name, value in arguments.items() if name in self._takes}}
        result: Tensor = self._link(**scores, **known)
        return result

    def observe(self, metrics: Mapping[str, float]) -> None:
        expected = metrics.get("preference/loss_at_start")
        if expected is None or metrics["policy/optimizer_steps"] != 1:
            return
        if not abs(metrics["preference/loss"] - expected) <= FIRST_LOSS_TOLERANCE * max(1.0, abs(expected)):
            log.warning(
                "the first loss is %.4f, but should be %.4f while policy and reference are equal: their log-probs "
                "differ (another precision or model), or the policy has already learnt these data",
                metrics["preference/loss"],
                expected,
            )

    def heldout(self, experience: Experience) -> Mapping[str, float]:
        """Accuracy and margin of pairs and, for a link of pairs, its loss without further terms. Where no prompt has a
        better and a worse response: how often the sign of a score matches its label. Ties count half."""
        assert experience.policy_logprobs is not None
        outcomes, normalised, beta = Outcomes.of(experience), self.config.length_normalised, self.config.beta
        scores = summed(experience.policy_logprobs, outcomes.masks, normalised)
        if self.config.reference == "frozen":
            assert experience.reference_logprobs is not None
            scores = scores - summed(experience.reference_logprobs, outcomes.masks, normalised)
        compared = self._by_scores(experience.groups, outcomes)
        better, worse = scores[compared.samples].T
        if not len(better):
            right = np.sign(scores) * np.where(outcomes.rewards > 0.5, 1, -1)
            return {"preference/heldout_accuracy": float(((right[outcomes.valid] + 1) / 2).mean())}
        measured = {
            "preference/heldout_accuracy": float(((np.sign(better - worse) + 1) / 2).mean()),
            "preference/heldout_margin": float((beta * (better - worse)).mean()),
        }
        if self.config.of_pairs:
            import torch

            values = {name: torch.from_numpy(value) for name, value in self._pair_values(compared).items()}
            chosen, rejected = torch.from_numpy(better), torch.from_numpy(worse)
            linked = self._linked({"beta": beta, **values}, chosen=chosen, rejected=rejected)
            measured["preference/heldout_loss"] = float((values["weight"] * linked).mean())
        return measured
