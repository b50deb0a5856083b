"""Load what a run trains on and is judged by: read problems, render them to prompts, and report unusable ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import getattr_static
from typing import TYPE_CHECKING

from algorithms.base import Render
from rewards.base import Reward, RewardConfig
from rlkit.config.messages import named_as_set
from rlkit.config.parts import OWN, ResolvedRun
from rlkit.config.plan import asks_reward, reads_recorded_labels
from rlkit.config.structured import split_unusable
from rlkit.data.base import BadRow, DataConfig, DataError, Problem, Split
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.environments.agent import Agent
from rlkit.environments.base import Environment
from rlkit.environments.tool import Tool, tools_of
from rlkit.experience import Prompt
from rlkit.models.folder import model_folder
from rlkit.tracking.tokens import Pieces
from rlkit.tracking.tracker import Tracker
from rlkit.weights.publication import CANARY_PROMPTS, CANARY_TOKENS, Canary

if TYPE_CHECKING:  # transformers takes seconds to import
    from rlkit.data.rendering import ChatTemplate


@dataclass(frozen=True)
class Loaded:
    train: Sequence[Prompt]
    heldout: Mapping[str, Sequence[Prompt]]
    """By set, the prompts that the verifier can judge."""
    recorded: Sequence[Prompt]
    """Held-out prompts with recorded responses."""
    render: Render
    pieces: Pieces | None
    """None: the tokenizer cannot decode token by token."""


def load_prompts(resolved: ResolvedRun, tracker: Tracker) -> Loaded:
    """Load all prompts of a run. Raises DataError."""
    from rlkit.data.conversations import render_recorded
    from rlkit.data.recorded import split_off_the_scale
    from rlkit.data.rendering import ChatTemplate, load_tokenizer, render, renderer
    from rlkit.rollout.engine import stop_token_ids

    config, rollout = resolved.config, resolved.config.rollout
    folder = model_folder(config.model.path)
    template = config.model.chat_template, config.model.chat_template_arguments
    tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
    if rollout.steps != "none" and not tokenizer.is_fast:
        raise DataError(
            f"model.path={config.model.path}: rollout.steps={rollout.steps} needs a tokenizer with a tokenizer.json "
            "(for the positions of tokens in the text); use rollout.steps=none"
        )
    for doubt in _doubts(resolved, ChatTemplate(tokenizer, *template), stop_token_ids(str(folder), tokenizer)):
        tracker.warn(doubt)
    source, from_data, algorithm = resolved.source, rollout.source == "data", resolved.make_algorithm()
    labelled = reads_recorded_labels(rollout, algorithm)
    # A frozen model's samples say nothing about the policy, but responses that come with the data do.
    measured = from_data or (rollout.source == "model" and bool(source.provides() & {"responses", "references"}))

    def rendered(
        problems: Sequence[Problem], bad: list[BadRow], data: DataConfig, what: str, answers: bool
    ) -> Sequence[Prompt]:
        fit, unfit = split_unusable(rollout.structured, problems)
        if answers:  # use the recorded ones
            fit, unlabelled = split_off_the_scale(fit) if labelled else (fit, [])
            unfit += unlabelled
            stops = stop_token_ids(str(folder), tokenizer)
            limits = (rollout.max_prompt_tokens, rollout.max_response_tokens)
            prompts, unusable = render_recorded(fit, tokenizer, stops, *limits, *template)
        else:
            prompts, unusable = render(fit, tokenizer, rollout.max_prompt_tokens, *template)
        if out := [*bad, *unfit, *unusable]:
            rows = sum(problem.rows for problem in problems) + len(bad)
            _report_bad_rows(out, rows, data.bad_row_share, what, tracker)
        return prompts

    shown = algorithm.needs().demonstrations
    sides: dict[Split, bool] = {"train": from_data or shown, "heldout": measured}
    loaded = {side: rendered(*source.load(side), resolved.data_config, side, sides[side]) for side in sides}
    for note in source.notes():
        tracker.warn(note)
    further = {}
    for name, one in resolved.sets.items():
        key = f"evaluation.sets.{name}"
        try:
            further[name] = rendered(*resolved.make_set(name).load_set(), one.config, key, answers=False)
        except DataError as error:
            raise DataError(named_as_set(str(error), key)) from error
    train = loaded["train"]
    if not train:
        raise DataError("the data source has no usable training problem")
    per_step = config.trainer.prompts_per_step
    if len(train) < per_step:
        tracker.warn(
            f"{len(train)} training questions, but {per_step} prompts per step (trainer.prompts_per_step): each is "
            f"asked {per_step / len(train):.3g} times in every step"
        )
    judges: list[tuple[type[Reward], RewardConfig]] = []
    if asks_reward(rollout, algorithm):
        judges.append((resolved.reward_class, resolved.reward_config))
    if rollout.workers and rollout.source != "model":
        judges.append((resolved.verifier_class, resolved.verifier_config))
    for message in dict.fromkeys(text for cls, own in judges for text in cls.doubts(own, train)):
        tracker.warn(message)
    samples = rollout.workers > 0 and rollout.source != "model"
    judged = _heldout(resolved, train, {OWN: loaded["heldout"], **further}, tracker) if samples else {}
    if from_data and samples and not judged:
        raise DataError(
            "evaluation.generate=true: no held-out problem has the gold answer that the verifier needs; leave the "
            "option out, or name a verifier that judges without one (verifier=NAME)"
        )
    recorded = loaded["heldout"][: config.trainer.evaluation_prompts] if measured else []
    if not samples and not recorded:
        tracker.warn("no held-out problem has a recorded response: this run is not evaluated")
    pieces = Pieces(tokenizer) if tokenizer.is_fast else None
    return Loaded(train, judged, recorded, renderer(tokenizer, *template), pieces)


def template_doubts(resolved: ResolvedRun) -> list[str]:
    """Return what an environment must not do with the model's chat template. Raises DataError if no episode can be
    played with it."""
    from rlkit.data.rendering import ChatTemplate, load_tokenizer
    from rlkit.rollout.engine import stop_token_ids

    model = resolved.config.model
    folder = model_folder(model.path)
    tokenizer = load_tokenizer(folder, model.trust_remote_code)
    template = ChatTemplate(tokenizer, model.chat_template, model.chat_template_arguments)
    return _doubts(resolved, template, stop_token_ids(str(folder), tokenizer))


def _doubts(resolved: ResolvedRun, template: ChatTemplate, stop_token_ids: Sequence[int]) -> list[str]:
    from rlkit.rollout.rendering import Renderer

    environment, options = resolved.environment_class, resolved.environment_config
    if environment is None or options is None or issubclass(environment, Agent):  # an agent's calls bring their tools
        return []
    tools = tools_of(environment)
    # Some environments know their tools only once they have started, and are then asked again.
    later = getattr_static(environment, "tools") is not getattr_static(Environment, "tools")
    if later and not tools:
        tools = (Tool("tool", "A tool.", {"type": "object", "properties": {}}),)
    renderer = Renderer(template, tools, stop_token_ids, options.calls, options.history)
    problems = renderer.problems()
    if problems and not later:
        raise DataError("; ".join(problems))
    return [*problems, *renderer.cautions()]


def with_epochs(resolved: ResolvedRun, problems: int) -> ResolvedRun:
    """Return the run with the number of steps that `trainer.total_epochs` takes."""
    trainer = resolved.config.trainer
    if trainer.total_epochs is None:
        return resolved
    changed = trainer.model_copy(update={"total_steps": trainer.steps_on(problems)})
    return replace(resolved, config=resolved.config.model_copy(update={"trainer": changed}))


def canary(train: Sequence[Prompt]) -> Canary:
    """Return pieces of different prompts, starting a little before they differ: long system prompts begin alike, and
    state that leaks from one sequence into the next shows only on several."""
    from rlkit.models.packing import shared_prefix  # torch comes with it

    prompts = [prompt.token_ids for prompt in train[: 8 * CANARY_PROMPTS]]
    start = max(0, len(shared_prefix(list(dict.fromkeys(prompts)))) - CANARY_TOKENS // 2)
    pieces = dict.fromkeys(ids[start : start + CANARY_TOKENS] for ids in prompts)
    return tuple(ids for ids in pieces if len(ids) > 1)[:CANARY_PROMPTS]


def _heldout(
    resolved: ResolvedRun, train: Sequence[Prompt], sets: Mapping[str, Sequence[Prompt]], tracker: Tracker
) -> dict[str, list[Prompt]]:
    """Return of each set the prompts that the verifier can judge, at most as many as configured."""
    answer_needed = resolved.verifier_class.traits(resolved.verifier_config).answer
    heldout = {}
    for name, prompts in sets.items():
        key = f"evaluation.sets.{name}"
        most = (resolved.sets[name].prompts if name else None) or resolved.config.trainer.evaluation_prompts
        judged = [prompt for prompt in prompts if not answer_needed or prompt.answer is not None][:most]
        if name and not judged:
            raise DataError(f"{key} has no problem with a gold answer, which the verifier needs (verifier=NAME)")
        if judged:
            heldout[name] = judged
    asked = {prompt.token_ids for prompts in heldout.values() for prompt in prompts} if resolved.sets else set()
    trained = {prompt.token_ids for prompt in train if prompt.token_ids in asked} if asked else set()
    for name, judged in heldout.items():
        if name and (known := sum(prompt.token_ids in trained for prompt in judged)):
            tracker.warn(f"{known} of the {len(judged)} problems of evaluation.sets.{name} are also trained on")
    if OWN not in heldout:
        whole = "" if heldout else ": this run is not evaluated (another verifier=NAME may judge without one)"
        tracker.warn(f"no held-out problem has a gold answer{whole}")
    return heldout


def _report_bad_rows(bad: Sequence[BadRow], rows: int, allowed_share: float, split: str, tracker: Tracker) -> None:
    refuse_too_many_bad_rows(bad, rows, allowed_share, f"{split} problems")
    first = "; ".join(f"{row.origin}: {row.reason}" for row in bad[:3])
    tracker.warn(f"{len(bad)} of {rows} {split} rows skipped: {first}")
