"""The questions, and recorded answers to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from rlkit.assessment.config import Evaluating
from rlkit.config.messages import named_as_set
from rlkit.config.parts import OWN
from rlkit.config.structured import split_unusable
from rlkit.data.base import BadRow, DataError, Problem
from rlkit.data.rows import first_rows, refuse_too_many_bad_rows
from rlkit.experience import Group, GroupScores, Prompt, Score
from rlkit.experience.types import recorded_group, text_group
from rlkit.models.folder import model_folder
from rlkit.tracking.tracker import Tracker


def load_questions(evaluating: Evaluating, tracker: Tracker) -> dict[str, Sequence[Prompt]]:
    """Return the questions for the models, by set. Raises DataError."""
    asked = {OWN: _questions(evaluating, tracker, OWN)}
    for name in evaluating.sets:
        try:
            asked[name] = _questions(evaluating, tracker, name)
        except DataError as error:
            raise DataError(named_as_set(str(error), _key(name))) from error
    return asked


def _key(name: str) -> str:
    return f"evaluation.sets.{name}" if name else "the data"


def _questions(evaluating: Evaluating, tracker: Tracker, name: str) -> Sequence[Prompt]:
    """Render the questions for the models that answer."""
    config, problems = evaluating.config, _problems(evaluating, tracker, name)
    usable, bad = split_unusable(config.rollout.structured, problems)
    if evaluating.kind == "endpoint":
        prompts: Sequence[Prompt] = [_as_text(problem) for problem in usable]
    else:
        from rlkit.data.rendering import load_tokenizer, render

        folder = model_folder(evaluating.policies[0].path)
        tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
        template = config.model.chat_template, config.model.chat_template_arguments
        prompts, unusable = render(usable, tokenizer, config.rollout.max_prompt_tokens, *template)
        bad = [*bad, *unusable]
    _report(evaluating, bad, problems, tracker, name)
    prompts = _judgeable(evaluating, prompts, tracker, name)
    limits = config.evaluate.questions, evaluating.sets[name].prompts if name else None
    return prompts[: min((limit for limit in limits if limit is not None), default=None)]


def load_recorded(evaluating: Evaluating, tracker: Tracker) -> list[Group]:
    """Return groups with the data's answers; without a judge, scored by the data's labels. Raises DataError."""
    config, problems = evaluating.config, _problems(evaluating, tracker, OWN)
    bad: list[BadRow] = []
    if evaluating.texts_suffice:
        groups = [_texts(f"evaluation-{i}", problem) for i, problem in enumerate(problems)]
    else:
        from rlkit.data.conversations import render_recorded
        from rlkit.data.rendering import load_tokenizer
        from rlkit.rollout.engine import stop_token_ids

        folder, rollout = model_folder(config.model.path), config.rollout
        tokenizer = load_tokenizer(folder, config.model.trust_remote_code)
        template = config.model.chat_template, config.model.chat_template_arguments
        limits = rollout.max_prompt_tokens, rollout.max_response_tokens
        prompts, bad = render_recorded(problems, tokenizer, stop_token_ids(str(folder), tokenizer), *limits, *template)
        groups = [recorded_group(prompt, f"evaluation-{i}", 1) for i, prompt in enumerate(prompts)]
    _report(evaluating, bad, problems, tracker, OWN)
    return groups[: config.evaluate.questions]


def data_hash(prompts: Sequence[Prompt]) -> str:
    """Hash the questions and right answers, independently of the model that reads them."""
    digest = hashlib.sha256()
    for prompt in prompts:
        messages = [(message.role, message.content) for message in prompt.messages]
        row = [prompt.id, messages, prompt.answer, list(prompt.references)]
        digest.update(json.dumps(row, ensure_ascii=True).encode())
    return digest.hexdigest()


def _problems(evaluating: Evaluating, tracker: Tracker, name: str) -> Sequence[Problem]:
    source = evaluating.source(name)
    # A run's held-out problems; for other data, all rows that are named.
    own = evaluating.own_questions and name == OWN
    problems, bad = source.load("heldout") if own else source.load_set()
    for note in source.notes():
        tracker.warn(note)
    _report(evaluating, bad, problems, tracker, name)
    if not problems:
        raise DataError(f"{_key(name)}: there is no usable question")
    return problems


def _report(
    evaluating: Evaluating, bad: Sequence[BadRow], problems: Sequence[Problem], tracker: Tracker, name: str
) -> None:
    if bad:
        rows = sum(problem.rows for problem in problems) + len(bad)
        refuse_too_many_bad_rows(bad, rows, evaluating.data_of(name).config.bad_row_share, _key(name))
        tracker.warn(f"{len(bad)} of {rows} rows of {_key(name)} skipped:{first_rows(bad)}")


def _judgeable(evaluating: Evaluating, prompts: Sequence[Prompt], tracker: Tracker, name: str) -> Sequence[Prompt]:
    judge = evaluating.judge
    if judge is None or not judge.cls.traits(judge.config).answer:
        return prompts
    judged = [prompt for prompt in prompts if prompt.answer is not None]
    if not judged:
        raise DataError(f"{_key(name)}: no question has the gold answer that {judge.cls.__name__} needs")
    if len(judged) < len(prompts):
        lacking = f"{len(prompts) - len(judged)} of {len(prompts)} questions of {_key(name)}"
        tracker.warn(f"{lacking} have no gold answer and are left out")
    return judged


def _as_text(problem: Problem) -> Prompt:
    return Prompt(problem.id, problem.question, (), problem.references, problem.answer, problem.columns)


def _texts(group_id: str, problem: Problem) -> Group:
    """Make a group of the answers as texts; a demonstration is the last message of what follows the question."""
    texts = [response.messages[-1].content for response in problem.responses] or list(problem.references)
    group = text_group(group_id, _as_text(problem), texts)
    values = [response.value for response in problem.responses] or [1.0] * len(texts)
    return group.with_scores(GroupScores(tuple(map(_labelled, values))))


def _labelled(value: float) -> Score:
    graded: Mapping[str, float] = {"correct": value} if 0 <= value <= 1 else {}
    return Score(value, components=graded)
