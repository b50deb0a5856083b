"""`reward=[math,polar]`: several rewards as one (docs/rewards/combination.md)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from rewards.base import HelpSection, Reward, RewardContext, RewardTraits, TrainableReward, UpdateWhen
from rewards.combined.config import CombinedConfig, RewardPart, ShapedPartOptions, read_parts, typed_model
from rewards.combined.scores import (
    COMBINERS,
    LogicalAnd,
    PartScores,
    Rule,
    combined_group,
    part_scores,
    with_process_of,
)
from rewards.shaping.chain import Chain, ReferenceRewards
from rewards.shaping.steps import (
    PROCESS_LEVELS,
    STEPS,
    FusingStep,
    GroupNormalise,
    Lsc,
    ReferenceStep,
    RunningStep,
    Step,
)
from rlkit.experience import Group, GroupScores, Prompt, UserError
from rlkit.experience.scores import checked_scores

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def update_times(parts: Sequence[RewardPart]) -> dict[str, UpdateWhen]:
    times = {part.name: part.traits.update_when for part in parts if issubclass(part.kind, TrainableReward)}
    return {name: when for name, when in times.items() if when != "none"}


def incompatibilities(config: CombinedConfig, parts: Sequence[RewardPart]) -> Iterator[str]:
    combine = config.combiner
    for part in parts:
        key = f"reward.parts.{part.name}"
        weight = part.options.weight
        if weight != 1.0 and not combine.weighted:
            yield f"{key}.weight={weight:g}: has no effect with combine={combine}"
        if (wrong := combine.weight_problem(weight)) is not None:
            yield f"{key}.weight={weight:g}: {wrong} with combine={combine}"
        if isinstance(combine, LogicalAnd) and any(isinstance(step, Lsc) for step in part.shaping):
            yield f"{key}.shaping: lsc takes the log-sigmoid that combine=logical_and takes again; use combine=sum"
        for name in ("workers", "max_failed_share"):
            if getattr(part.config, name) != type(part.config).model_fields[name].default:
                yield f"{key}.{name}={getattr(part.config, name)}: has no effect in a part; set reward.{name}"
        yield from _unfit_steps(f"{key}.shaping", part.shaping, [part])
    yield from _unfit_steps("reward.shaping", config.shaping, parts)
    yield from _unfit_times(config, parts)
    process = [part.name for part in parts if part.traits.process_rewards]
    if len(process) > 1 and not combine.weighted:
        yield (
            f"reward.combine={combine}: {' and '.join(process)} give process rewards, which can only be summed; use "
            "sum, logical_and or mean"
        )
    if combine.weighted and all(part.options.weight == 0 for part in parts):
        yield "reward.parts: every part has weight 0, so every reward is 0 and nothing is learnt; set one of them"
    times = update_times(parts)
    if len(set(times.values())) > 1:
        listed = ", ".join(f"{name} {when}" for name, when in times.items())
        yield f"reward.parts: rewards that learn must all do so at the same point of a step, before or after ({listed})"


def _unfit_steps(key: str, steps: Sequence[Step], parts: Sequence[RewardPart]) -> Iterator[str]:
    process = [part for part in parts if part.traits.process_rewards]
    blind = [part for part in parts if not part.traits.judges_texts]
    learning = update_times(parts)
    for step in steps:
        if isinstance(step, PROCESS_LEVELS) and not process:
            yield f"{key}: {step.kind} shapes process rewards, and {' and '.join(p.name for p in parts)} gives none"
        if isinstance(step, FusingStep) and not any(part.traits.outcome_rewards for part in parts):
            yield f"{key}: {step.kind} needs an outcome, too; shape the combined reward, 'reward=[math,NAME]'"
        if isinstance(step, ReferenceStep) and step.reference_responses and (process or learning or blind):
            names = dict.fromkeys([*(part.name for part in (*process, *blind)), *learning])
            yield (
                f"{key}: {step.kind} scores reference_responses once and by their text, which {' and '.join(names)} "
                "cannot; use reference_rewards or reference_value"
            )


def _unfit_times(config: CombinedConfig, parts: Sequence[RewardPart]) -> Iterator[str]:
    needed = sum(part.config.timeout_seconds for part in parts)
    if needed > config.timeout_seconds * (1 + 1e-9):
        listed = ", ".join(f"{part.name} {part.config.timeout_seconds:g}" for part in parts)
        yield (
            f"reward.timeout_seconds={config.timeout_seconds:g}: the parts score one after the other and may take "
            f"{needed:g} s ({listed}); set at least that, or lower reward.parts.NAME.timeout_seconds"
        )


def with_part_key(message: str, part: RewardPart) -> str:
    """Rewrite a part's message with the user's keys (`reward.x` -> `reward.parts.NAME.x`)."""
    own = "|".join(sorted(map(re.escape, part.kind.Config.model_fields), key=len, reverse=True))
    key = f"reward.parts.{part.name}"
    moved = re.sub(rf"\breward\.(?=(?:{own})\b)", f"{key}.", message)
    return moved if moved.startswith(key) else f"{key}: {moved}"


ScoresByPart = dict[str, list[GroupScores | None]]
"""Scores by part; None where the part does not judge the prompt."""


class PartFailedError(UserError): ...


class CombinedReward(TrainableReward):
    """Asks its parts one after the other, shapes and combines their scores, and shapes the result.

    A response that a part cannot judge is invalid. If a part learns, or a step has running statistics, the whole counts
    as a reward that learns and has one worker.
    """

    Config = CombinedConfig

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._parts = read_parts(config)
        self._rewards: dict[str, Reward] = {part.name: part.kind(part.config, context) for part in self._parts}
        self._chains = {part.name: self._chain_of(part) for part in self._parts}
        self._whole = Chain(config.shaping, "combined", ReferenceRewards(lambda groups: self._before_shaping(groups)))

    def _chain_of(self, part: RewardPart) -> Chain:
        references = ReferenceRewards(lambda groups: self._ask([part], groups)[part.name])
        return Chain(part.shaping, f"part {part.name}", references)

    @classmethod
    def config_model(cls, section: Mapping[str, Any]) -> type[BaseModel]:
        return typed_model(section, cls.Config)

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """Join the parts' traits; running statistics are updated before advantages are computed."""
        parts = read_parts(config)
        traits = [part.traits for part in parts]
        steps = [*config.shaping, *(step for part in parts for step in part.shaping)]
        columns = {name for own in traits for name in own.columns}
        columns = columns.union(*(part.options.when.columns() for part in parts), _reference_columns(steps))
        learning = set(update_times(parts).values())
        if any(isinstance(step, RunningStep) for step in steps):
            learning.add("before")
        return RewardTraits(
            references=any(own.references for own in traits) or "references" in columns,
            answer=any(own.answer for own in traits) or "answer" in columns,
            columns=tuple(sorted(columns - {"references", "answer"})),
            samples=max([own.samples for own in traits] + [2 for step in steps if isinstance(step, GroupNormalise)]),
            judges_texts=all(own.judges_texts for own in traits),
            joins_tokens=any(own.joins_tokens for own in traits),
            process_rewards=any(own.process_rewards for own in traits),
            process_in_value=all(own.process_in_value for own in traits if own.process_rewards),
            environment=any(own.environment for own in traits),
            outcome_rewards=any(own.outcome_rewards for own in traits),
            steps=any(own.steps for own in traits),
            uses_gpu=any(own.uses_gpu for own in traits),
            raw_scores=_gives_raw_scores(config, parts),
            update_when="before" if "before" in learning else "after" if learning else "none",
            follows_policy=any(part.traits.follows_policy and issubclass(part.kind, TrainableReward) for part in parts),
        )

    @classmethod
    def check(cls, config: Any) -> list[str]:
        parts = read_parts(config)
        own = [with_part_key(message, part) for part in parts for message in part.kind.check(part.config)]
        return [*super().check(config), *incompatibilities(config, parts), *own]

    @classmethod
    def doubts(cls, config: Any, prompts: Sequence[Prompt]) -> list[str]:
        return [message for part in read_parts(config) for message in part.kind.doubts(part.config, prompts)]

    def start(self) -> None:
        """Start every part; raise PartFailedError with the name of the first one that cannot start."""
        for name, reward in self._rewards.items():
            try:
                reward.start()
            except Exception as error:
                raise PartFailedError(f"part {name} cannot start: {_named(error)}") from error

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Ask and combine all parts; if any of them raised, raise PartFailedError once all have been asked."""
        return self._combined(groups, self._ask(self._parts, groups))

    def _before_shaping(self, groups: Sequence[Group]) -> list[GroupScores]:
        return self._joined(groups, self._ask(self._parts, groups), learn=False)

    def _ask(self, parts: Sequence[RewardPart], groups: Sequence[Group], rescore: bool = False) -> ScoresByPart:
        scores: ScoresByPart = {}
        failures: dict[str, Exception] = {}
        for part in parts:
            routed = [group for group in groups if part.options.when.applies(group.prompt)]
            reward = self._rewards[part.name]
            try:
                if not routed:
                    answer: Any = []
                elif rescore and isinstance(reward, TrainableReward):
                    answer = reward.rescore([self._as_seen_by(part, group) for group in routed])
                else:
                    answer = reward.score(routed)
            except Exception as error:  # ask the other parts all the same, so that the message lists every failure
                log.exception("part %s raised", part.name)
                failures[part.name] = error
                continue
            judged = iter(checked_scores(routed, answer))
            scores[part.name] = [next(judged) if part.options.when.applies(group.prompt) else None for group in groups]
        if failures:
            causes = "; ".join(f"part {name}: {_named(error)}" for name, error in failures.items())
            raise PartFailedError(causes) from next(iter(failures.values()))
        return scores

    def _joined(self, groups: Sequence[Group], scores: ScoresByPart, learn: bool) -> list[GroupScores]:
        shaped = {name: self._chains[name](groups, own, learn) for name, own in scores.items()}
        rule = Rule(self.config.combiner, self.config.spread_weight)
        joined = []
        for i, group in enumerate(groups):
            parts = [
                PartScores(part.name, part.options.weight, raw, after, _shapes_outcomes(part.shaping))
                for part in self._parts
                if (raw := scores[part.name][i]) is not None and (after := shaped[part.name][i]) is not None
            ]
            joined.append(combined_group(len(group.samples), parts, rule))
        return joined

    def _combined(self, groups: Sequence[Group], scores: ScoresByPart, learn: bool = False) -> list[GroupScores]:
        """Join the parts' scores and shape the whole; if that changes values, add the component `unshaped`."""
        joined = self._joined(groups, scores, learn)
        if _shapes_outcomes(self.config.shaping):
            joined = [_with_unshaped(scores) for scores in joined]
        return [scores for scores in self._whole(groups, joined, learn) if scores is not None]

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        learning = [part.name for part in self._parts if part.name in update_times(self._parts)]
        metrics: dict[str, float] = {}
        for part in self._parts:
            reward = self._rewards[part.name]
            if part.name not in learning or not isinstance(reward, TrainableReward):
                continue
            seen = [self._as_seen_by(part, group) for group in groups if part.options.when.applies(group.prompt)]
            learnt = reward.update(seen) if seen else {}
            metrics |= learnt if len(learning) == 1 else {f"{part.name}/{key}": v for key, v in learnt.items()}
        if self._statistics():
            self._combined(groups, self._earlier(groups), learn=True)
        self.version += 1
        return metrics

    def rescore(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Score again with the parts that learn before advantages are computed, and shape everything again.

        The other parts' values come from earlier scores. Process rewards are kept if there are no new ones.
        """
        before = [name for name, when in update_times(self._parts).items() if when == "before"]
        scores = self._earlier(groups)
        earlier = [_scores(group) for group in groups]
        if not before:
            again = self._combined(groups, scores)
            return [with_process_of(new, old) for new, old in zip(again, earlier, strict=True)]
        learnt = [part for part in self._parts if part.name in before]
        # Process rewards of one part cannot be recovered from the sum over several.
        process = [part for part in self._parts if part.name not in before and part.traits.process_rewards]
        scores |= self._ask(learnt, groups, rescore=True) | self._ask(process, groups)
        again = self._combined(groups, scores)
        return [_invalid_stays(new, old) for new, old in zip(again, earlier, strict=True)]

    def policy_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        tensors = list(weights)
        for part in self._parts:
            reward = self._rewards[part.name]
            if part.traits.follows_policy and isinstance(reward, TrainableReward):
                reward.policy_weights(version, tensors)

    def save(self, folder: Path) -> None:
        for name in update_times(self._parts):
            reward = self._rewards[name]
            assert isinstance(reward, TrainableReward)
            reward.save(folder / name)

    def _earlier(self, groups: Sequence[Group]) -> ScoresByPart:
        return {
            part.name: [
                _scores(self._as_seen_by(part, group)) if part.options.when.applies(group.prompt) else None
                for group in groups
            ]
            for part in self._parts
        }

    def _as_seen_by(self, part: RewardPart, group: Group) -> Group:
        judges = [other.name for other in self._parts if other.options.when.applies(group.prompt)]
        # If the combiner builds an ensemble, the parts' values have replaced a part's own members.
        alone = judges == [part.name] and not self.config.combiner.ensemble
        return group.with_scores(part_scores(_scores(group), part.name, alone))

    def _statistics(self) -> bool:
        return any(chain.statistics for chain in (self._whole, *self._chains.values()))

    @classmethod
    def help_sections(cls) -> Iterator[HelpSection]:
        text = "Each part of reward=[a,b] has the fields of reward=a or reward=b, and these."
        yield HelpSection("reward.parts.NAME", text, ShapedPartOptions, "reward.parts.NAME.")
        for title, known in (("reward.combine={}", COMBINERS), ("shaping step {{kind:{}}}", STEPS)):
            for name, kind in known.items():
                yield HelpSection(title.format(name), (kind.__doc__ or "").partition("\n")[0], kind)

    def state_dict(self) -> Mapping[str, Any]:
        learning = update_times(self._parts)
        return {
            "version": self.version,
            "parts": {
                name: reward.state_dict()
                for name, reward in self._rewards.items()
                if name in learning and isinstance(reward, TrainableReward)
            },
            "shaping": self._whole.state_dict(),
            "part_shaping": {name: chain.state_dict() for name, chain in self._chains.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if the saved parts or steps differ."""
        learning = update_times(self._parts)
        for what, saved, here in (
            ("parts", state["part_shaping"], self._chains),
            ("parts that learn", state["parts"], learning),
        ):
            if set(saved) != set(here):
                raise ValueError(f"the saved reward has the {what} {sorted(saved)}, this one {sorted(here)}")
        for name, own in state["parts"].items():
            reward = self._rewards[name]
            assert isinstance(reward, TrainableReward)
            reward.load_state_dict(own)
        self._whole.load_state_dict(state["shaping"])
        for name, own in state["part_shaping"].items():
            self._chains[name].load_state_dict(own)
        self.version = state["version"]

    def close(self) -> None:
        """Close every part, then raise the first error."""
        errors = []
        for name, reward in self._rewards.items():
            try:
                reward.close()
            except Exception as error:
                log.exception("part %s could not be closed", name)
                errors.append(error)
        if errors:
            raise errors[0]


def _gives_raw_scores(config: CombinedConfig, parts: Sequence[RewardPart]) -> bool:
    """Whether a part with non-zero weight gives raw scores that no step of it or of the whole brings to one scale."""
    if config.combiner.sets_scale or any(step.sets_scale for step in config.shaping):
        return False
    counted = (part for part in parts if part.options.weight and part.traits.raw_scores)
    return any(not any(step.sets_scale for step in part.shaping) for part in counted)


def _reference_columns(steps: Sequence[Step]) -> set[str]:
    named = (step for step in steps if isinstance(step, ReferenceStep))
    return {name for step in named for name in (step.reference_rewards, step.reference_responses) if name is not None}


def _shapes_outcomes(steps: Sequence[Step]) -> bool:
    return not all(isinstance(step, PROCESS_LEVELS) for step in steps)


def _with_unshaped(scores: GroupScores) -> GroupScores:
    samples = (
        score if score.value is None else replace(score, components={**score.components, "unshaped": score.value})
        for score in scores.samples
    )
    return replace(scores, samples=tuple(samples))


def _scores(group: Group) -> GroupScores:
    if group.scores is None:
        raise ValueError(f"group {group.id} has no scores yet")
    return group.scores


def _invalid_stays(new: GroupScores, old: GroupScores) -> GroupScores:
    return GroupScores(tuple(n if o.valid else o for n, o in zip(new.samples, old.samples, strict=True)), old.pairs)


def _named(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
