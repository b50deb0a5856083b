"""Options of `algorithms/preference.py`, and links by name; no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from algorithms.base import AlgorithmConfig
from algorithms.functional import links
from algorithms.functional.pairs import Pairing
from rlkit.experience.names import find_object, nearest
from rlkit.experience.section import Coefficient

Link = Callable[..., Any]
"""Maps scores, other tensors that it names and options to losses."""
LINKS: Mapping[str, Link] = {
    link.__name__: link
    for link in (
        links.sigmoid,
        links.robust,
        links.ipo,
        links.hinge,
        links.exo,
        links.nca,
        links.apo_zero,
        links.apo_down,
        links.sppo,
        links.orpo,
        links.rdp,
        links.copg,
        links.kto,
        links.bco,
        links.pacs,
    )
}
OF_PAIRS = frozenset({"chosen", "rejected", "probability", "margin", "gain", "old_chosen", "old_rejected"})
OF_SAMPLES = frozenset({"scores", "labels", "baseline", "shift", "group", "weights"})
OPTIONS = frozenset({"label_smoothing", "clip", "desirable_weight", "undesirable_weight"})
"""Options of the configuration that a link may take, besides beta."""


class PreferenceConfig(AlgorithmConfig):
    link: str = "sigmoid"
    """Turns scores into a loss. Of pairs: sigmoid, robust, ipo, hinge, exo, nca, apo_zero, apo_down, sppo, orpo; rdp
    and copg, which read rewards. Of labels from 0 to 1: kto, bco; pacs, by groups. Or the dotted path of a function."""
    beta: float = Field(default=0.1, gt=0)
    """How steeply losses change with scores: large values stay close to the reference."""
    pairs: Pairing = "auto"
    """Which responses are compared. judge: those that the data or a judge compared. By scores: best_worst, adjacent or
    all (that differ; for rdp, copg and labels=gain equal ones, too). auto: judge where a group has preferences, else
    best_worst."""
    labels: Literal["order", "gain", "agreement"] = "order"
    """Probability that the better response of a pair is better. order: as recorded or judged, else 1; gain: by the
    difference of rewards (DNO); agreement: the policy ranks best and worst, and the reference's agreement is the
    probability (CREAM)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    reference: Literal["frozen", "none", "old"] = "frozen"
    """What scores are relative to: the reference policy, nothing, or the policy before the step."""
    length_normalised: bool = False
    """Scores are means over tokens, not sums."""
    target_margin: float = Field(default=0.0, ge=0)
    """Target difference of scores times beta, without a reference (SimPO's gamma)."""
    nll_coefficient: Coefficient = 0.0
    """Weight of -log pi of the better response, per token (RPO, CPO; ORPO: 1)."""
    on_policy_weights: bool = False
    """Weight pairs by how likely the policy is to sample them (WPO)."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of tokens beyond the length of the pair's shorter response (LD-DPO); 1: all count equally."""
    guide: str | None = None
    """Folder of a preference-trained model that weights tokens (TGDPO)."""
    guide_weight: float = Field(default=0.5, gt=0)
    """TGDPO's alpha."""
    dynamic_beta: float = Field(default=0.0, ge=0)
    """Increase beta by up to this share as the rewards' difference grows (MM-DPO's w)."""
    dynamic_beta_rate: float = Field(default=0.5, gt=0)
    """How fast beta increases (MM-DPO's k)."""
    token_reward_coefficient: Coefficient = 0.0
    """Weight of the model's own token rewards (T-REG); needs two more forward passes of the reference."""
    better_prompt: str = "Give the best answer that you can: right, helpful and clear."
    """T-REG: appended to the prompt in one of these passes."""
    worse_prompt: str = "Give a bad answer: wrong, unhelpful and unclear."
    """T-REG: appended to the prompt in the other."""
    clip: float | None = Field(default=None, gt=0)
    """rdp: scores count up to this distance from their values before the step."""
    desirable_weight: Coefficient = 1.0
    """kto: weight of good responses."""
    undesirable_weight: Coefficient = 1.0
    """kto: weight of bad responses; set both weights so that both kinds matter if one is rare."""
    balance_classes: bool = False
    """pacs: give right and wrong responses of a group the same total weight."""

    @property
    def of_pairs(self) -> bool:
        return "chosen" in link_parameters(self.link)

    @field_validator("link")
    @classmethod
    def _link_exists(cls, name: str) -> str:
        link_parameters(name)
        return name

    @model_validator(mode="after")
    def _fits_the_link(self) -> Self:
        link, frozen = f"link={self.link}", self.reference == "frozen"
        if self.link == "exo" and not self.label_smoothing:
            raise ValueError("link=exo needs label_smoothing above 0 (published: 0.001): the loss takes its logarithm")
        if self.link == "orpo" and (self.reference != "none" or not self.length_normalised):
            raise ValueError("link=orpo takes mean log-probs: set reference=none and length_normalised=true")
        if not frozen and link_parameters(self.link) & {"baseline", "shift"}:
            raise ValueError(f"{link} measures the distance to a reference: set reference=frozen")
        if not frozen and self.labels == "agreement":
            raise ValueError("labels=agreement compares two rankings: set reference=frozen")
        if self.ld_alpha < 1 and (self.length_normalised or self.guide):
            raise ValueError("ld_alpha weights sums of log-ratios: do not combine it with length_normalised or a guide")
        if self.guide is not None and (not frozen or self.length_normalised):
            raise ValueError(
                "guide weights sums of log-ratios to a reference: set reference=frozen and length_normalised=false"
            )
        for name, (acts, otherwise) in self._effects().items():
            if not acts and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with {otherwise}")
        return self

    def idle(self) -> frozenset[str]:
        effects = self._effects()
        idle = {name for name, (acts, why) in effects.items() if not acts and why.startswith(("link=", "reference="))}
        return frozenset(idle | {name for name, (_, why) in effects.items() if why.partition("=")[0] in idle})

    def _effects(self) -> dict[str, tuple[bool, str]]:
        """By option: whether it has an effect, and the setting with which it has none."""
        takes, link = link_parameters(self.link), f"link={self.link}"
        frozen, self_ranked = self.reference == "frozen", self.labels == "agreement"
        return {
            "label_smoothing": (bool(takes & {"label_smoothing", "probability"}), link),
            "labels": ("probability" in takes, link),
            "pairs": (self.of_pairs and not self_ranked, "labels=agreement" if self_ranked else link),
            "target_margin": ("margin" in takes and self.reference == "none", f"{link} reference={self.reference}"),
            "nll_coefficient": (self.of_pairs, link),
            "on_policy_weights": (self.of_pairs, link),
            "ld_alpha": (self.of_pairs, link),
            "guide": (self.of_pairs, link),
            "guide_weight": (self.guide is not None, "guide=null"),
            "dynamic_beta": (self.of_pairs, link),
            "dynamic_beta_rate": (self.dynamic_beta > 0, "dynamic_beta=0"),
            "token_reward_coefficient": (self.of_pairs and frozen, f"{link} reference={self.reference}"),
            "better_prompt": (self.token_reward_coefficient > 0, "token_reward_coefficient=0"),
            "worse_prompt": (self.token_reward_coefficient > 0, "token_reward_coefficient=0"),
            "clip": ("clip" in takes, link),
            "desirable_weight": ("desirable_weight" in takes, link),
            "undesirable_weight": ("undesirable_weight" in takes, link),
            "balance_classes": ("weights" in takes, link),
            "reference_every_steps": (frozen, f"reference={self.reference}"),
            "reference_mix": (self.reference_every_steps > 0, "reference_every_steps=0"),
        }


def find_link(name: str) -> Link:
    """Look up a link. Raise ValueError (NotFoundError) if it is unknown."""
    if name in LINKS:
        return LINKS[name]
    if "." not in name:
        guess = nearest(name, LINKS)
        hint = f"did you mean {guess}? " if guess else ""
        raise ValueError(f"{hint}must be one of {', '.join(LINKS)}, or the dotted path of a function")
    link: Link = find_object(name)
    return link


def link_parameters(name: str) -> frozenset[str]:
    """Names of the parameters of a link. Raise ValueError if one of them cannot be supplied."""
    parameters = inspect.signature(find_link(name)).parameters
    if not {"chosen", "rejected"} <= set(parameters) and "scores" not in parameters:
        raise ValueError("must take either chosen and rejected, or scores")
    known = sorted((OF_PAIRS if "chosen" in parameters else OF_SAMPLES) | OPTIONS | {"beta"})
    for parameter in parameters.values():
        if parameter.name not in known and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"takes {parameter.name}, which is not one of {', '.join(known)}")
    return frozenset(parameters)
