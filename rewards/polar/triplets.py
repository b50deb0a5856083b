"""Builds POLAR's triplets (reference, chosen, rejected) from rows, policies' responses, or right and wrong answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, model_validator

from rlkit.data.base import BadRow
from rlkit.data.cells import Row, RowError, cell
from rlkit.reward_training import rows
from rlkit.reward_training.rows import RewardDataConfig, Side

Form = Literal["prompts", "trajectories", "columns", "triplets"]
Policy = TypeVar("Policy", bound=Hashable)


class PolarRows(RewardDataConfig):
    form: Form | None = None
    """prompts: prompts for the policies. trajectories: one response per row, as stage=generate writes them. columns:
    one prompt per row and a column per policy. triplets: prompt, reference, chosen and rejected, as in the official
    code. null: prompts for stage=generate, trajectories for stage=pretrain, otherwise triplets."""
    prompt_column: str = "prompt"
    """The prompt: a text, or a list of chat messages (their contents, one per line: POLAR reads no roles)."""
    reference_column: str | None = None
    """The gold response (text or messages), to tell right from wrong; null: none. In triplets always `reference`."""
    response_column: str = "response"
    """trajectories: column with the response."""
    policy_column: str = "policy"
    """trajectories: column with the policy that wrote it."""
    style_column: str | None = None
    """trajectories: column with its style; only policies of one style are compared. null: all have the same style."""
    label_column: str | None = None
    """trajectories: column that says if the response is right (true, false or null); null: not known."""
    policy_columns: dict[str, str] = Field(default={})
    """columns: column -> policy; two columns of one policy are two of its responses. Each cell is a text, or an object
    with `response_key` and, if the label is known, `label_key`."""
    response_key: str = "solution"
    """columns: the key of the text in an object."""
    label_key: str = "is_correct"
    """columns: the key of the label in an object."""

    @model_validator(mode="after")
    def _options_act(self) -> PolarRows:
        of = {
            "trajectories": ("response_column", "policy_column", "style_column", "label_column"),
            "columns": ("policy_columns", "response_key", "label_key"),
        }
        for form, names in of.items():
            for name in names:
                if self.form not in (form, None) and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"data.{name} has no effect with data.form={self.form}")
        if self.form == "columns" and not self.policy_columns:
            raise ValueError("data.form=columns needs data.policy_columns={COLUMN: POLICY, ...}")
        return self


@dataclass(frozen=True, slots=True)
class Triplet:
    """A reference, an answer closer to it (chosen) and one further from it (rejected)."""

    prompt: str
    reference: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Trajectory:
    text: str
    policy: str
    style: str = ""
    correct: bool | None = None


@dataclass(slots=True)
class PromptRows:
    prompt: str
    reference: str | None = None
    """The gold response."""
    trajectories: list[Trajectory] = field(default_factory=list)
    triplets: list[Triplet] = field(default_factory=list)


# -- rows --------------------------------------------------------------------------------------------------------------


def read(config: PolarRows, form: Form, side: Side = "train") -> tuple[list[PromptRows], list[BadRow]]:
    """Return a side's prompts and unusable rows. Raise DataError if too many are."""
    parsed, bad = rows.read(config, lambda row, _: [_parse(row, config, form)], side)
    prompts: dict[str, PromptRows] = {}
    for prompt in parsed:
        known = prompts.setdefault(prompt.prompt, PromptRows(prompt.prompt, prompt.reference))
        known.trajectories += prompt.trajectories
        known.triplets += prompt.triplets
    return list(prompts.values()), bad


def read_split(config: PolarRows, form: Form) -> tuple[list[PromptRows], list[PromptRows], list[BadRow]]:
    """Return training and held-out prompts, and the unusable rows. Raise DataError."""
    return rows.read_split(config, lambda side: read(config, form, side), lambda prompt: prompt.prompt, "prompt")


def _parse(row: Row, config: PolarRows, form: Form) -> PromptRows:
    prompt = _text(row, config.prompt_column)
    if form == "triplets":
        reference, chosen, rejected = (_text(row, name) for name in ("reference", "chosen", "rejected"))
        if chosen == rejected:
            raise RowError("chosen and rejected are equal")
        return PromptRows(prompt, triplets=[Triplet(prompt, reference, chosen, rejected)])
    gold = None if config.reference_column is None else _text(row, config.reference_column)
    return PromptRows(prompt, gold, list(_trajectories(row, config, form)))


def _trajectories(row: Row, config: PolarRows, form: Form) -> Iterator[Trajectory]:
    if form == "trajectories":
        style = "" if config.style_column is None else str(cell(row, config.style_column))
        label = None if config.label_column is None else _label(row.get(config.label_column), config.label_column)
        yield Trajectory(_text(row, config.response_column), str(cell(row, config.policy_column)), style, label)
    elif form == "columns":
        for column, policy in config.policy_columns.items():
            value = cell(row, column)
            inside = value if isinstance(value, Mapping) else {config.response_key: value}
            label = _label(inside.get(config.label_key), config.label_key)
            yield Trajectory(_text(inside, config.response_key), policy, "", label)


def _label(value: Any, name: str) -> bool | None:
    if value is not None and value not in (0, 1):
        raise RowError(f"{name} must be true or false, not {value!r}")
    return None if value is None else bool(value)


def _text(row: Row, column: str) -> str:
    value = cell(row, column)
    if isinstance(value, list) and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in value):
        return "\n".join(message["content"] for message in value)
    if not isinstance(value, str):
        raise RowError(f"{column} must be a text or a list of messages, not {type(value).__name__}")
    return value


def write_triplets(triplets: Iterable[Triplet], file: Path) -> None:
    """Write JSON Lines of prompt, reference, chosen and rejected, each a list of messages."""
    with file.open("w", encoding="utf-8") as stream:
        for triplet in triplets:
            record = {"prompt": [{"role": "user", "content": triplet.prompt}]}
            for name in ("reference", "chosen", "rejected"):
                record[name] = [{"role": "assistant", "content": getattr(triplet, name)}]
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


# -- from trajectories -------------------------------------------------------------------------------------------------


def contrasts(
    prompts: Sequence[PromptRows], policies: Sequence[str], across_styles: bool = False
) -> list[list[Triplet]]:
    answers: dict[tuple[str, str], list[list[str]]] = {}
    for index, prompt in enumerate(prompts):
        for trajectory in prompt.trajectories:
            if trajectory.policy in policies:
                key = (trajectory.policy, "" if across_styles else trajectory.style)
                answers.setdefault(key, [[] for _ in prompts])[index].append(trajectory.text)
    texts = [prompt.prompt for prompt in prompts]
    return policy_triplets(texts, dict(sorted(answers.items())), lambda policy_and_style: policy_and_style[1])


def verdicts(prompts: Sequence[PromptRows]) -> list[list[Triplet]]:
    """Return fine-tuning triplets: those given in the rows, and right against wrong answers by their labels.

    Triplets of one prompt and reference are neighbours, so that what they share is computed once.
    """
    groups: dict[tuple[str, str], list[Triplet]] = {}
    for prompt in prompts:
        right, wrong = ([t.text for t in prompt.trajectories if t.correct is label] for label in (True, False))
        for triplet in prompt.triplets + labelled_triplets(prompt.prompt, prompt.reference, right, wrong):
            groups.setdefault((triplet.prompt, triplet.reference), []).append(triplet)
    return list(groups.values())


def policy_triplets(
    prompts: Sequence[str], answers: Mapping[Policy, Sequence[Sequence[str]]], style_of: Callable[[Policy], str]
) -> list[list[Triplet]]:
    """Take reference and chosen from one policy, rejected from another *of the same style* (equation 7).

    Across styles, style alone would tell policies apart. `answers[policy][i]` are a policy's answers to prompt i; each
    is the reference of the next one. All ordered pairs of policies are used; triplets of one prompt and reference are
    neighbours; equal candidates are left out.
    """
    rivals: dict[Policy, list[Policy]] = {}
    for a, b in rival_pairs(list(answers), style_of):
        rivals.setdefault(a, []).append(b)
    groups = []
    for a, others in rivals.items():
        for index, prompt in enumerate(prompts):
            for turn, (reference, chosen) in enumerate(pairwise(answers[a][index])):
                theirs = [answers[b][index] for b in others]
                rejected = dict.fromkeys(texts[turn % len(texts)] for texts in theirs if texts)
                groups.append([Triplet(prompt, reference, chosen, text) for text in rejected if text != chosen])
    return [triplets for triplets in groups if triplets]


def rival_pairs(policies: Sequence[Policy], style_of: Callable[[Policy], str]) -> list[tuple[Policy, Policy]]:
    return [(a, b) for a in policies for b in policies if a != b and style_of(a) == style_of(b)]


def labelled_triplets(prompt: str, reference: str | None, right: Sequence[str], wrong: Sequence[str]) -> list[Triplet]:
    """Pair right (chosen) with wrong (rejected) answers: equation 8. Without a gold reference, use right answers."""
    right, wrong = list(dict.fromkeys(right)), list(dict.fromkeys(wrong))
    if reference is not None:
        return [Triplet(prompt, reference, good, bad) for good in right for bad in wrong]
    return [Triplet(prompt, best, good, bad) for best, good in pairwise(right) for bad in wrong]


def attainable_accuracy(triplets: Sequence[Triplet], final: Callable[[str], str]) -> float:
    """Return the accuracy of a scorer that only compares final answers with the reference's (a tie counts a half): the
    ceiling for any judge of results."""
    wins = []
    for triplet in triplets:
        gold = final(triplet.reference)
        wins.append(0.5 + 0.5 * ((final(triplet.chosen) == gold) - (final(triplet.rejected) == gold)))
    return float(np.mean(wins))


def expected_accuracy(error_rates: Mapping[Policy, float], style_of: Callable[[Policy], str]) -> float:
    """Return the same accuracy from error rates: 1/2 + 1/2 mean over pairs (A, B) of (1 - e_A)(e_B - e_A)."""
    pairs = rival_pairs(list(error_rates), style_of)
    return 0.5 + 0.5 * float(np.mean([(1 - error_rates[a]) * (error_rates[b] - error_rates[a]) for a, b in pairs]))
