"""The queries about runs, which http.py, report.py and text.py share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_type_hints
from urllib.parse import urlencode

from pydantic import BaseModel, ValidationError

from rlkit.experience import UserError
from rlkit.view import compare, curves, runs, sample, samples, triage
from rlkit.view.schema import AboutRun, AboutRuns, Asked, RunList

PATIENCE_SECONDS = 1.0
"""How long an answer waits for the index of a file that has grown; indexing continues in the background."""


class QuestionError(UserError):
    """A parameter is missing, unknown or wrong."""


class Question:
    """A function of one run (AboutRun), of some (AboutRuns) or of all, and of further parameters if it has any."""

    def __init__(self, answer: Callable[..., BaseModel]) -> None:
        types = get_type_hints(answer)
        self._answer, self._has_more = answer, "asked" in types
        self.asked: type[Asked] = types.get("asked", AboutRun)
        self.result: type[BaseModel] = types["return"]
        self.about = (answer.__doc__ or self.result.__doc__ or "").strip()

    def answer(self, known: runs.Runs, asked: Asked) -> BaseModel:
        about: Any = known
        if isinstance(asked, AboutRun):
            about = known.get(asked.run)
            about.index.follow(PATIENCE_SECONDS)
        elif isinstance(asked, AboutRuns):
            about = [known.get(name) for name in asked.runs.split(",") if name] or known.all()
            for run in about:
                run.index.follow(PATIENCE_SECONDS)
        return self._answer(about, asked) if self._has_more else self._answer(about)


def _listed(known: runs.Runs, asked: Asked) -> RunList:
    """Return all runs and their states."""
    del asked
    return known.listed()


_ANSWERS: dict[str, Callable[..., BaseModel]] = {
    "runs": _listed,
    "metrics": curves.metrics,
    "overview": curves.overview,
    "samples": samples.samples,
    "histogram": samples.histogram,
    "scatter": samples.scatter,
    "distribution": samples.distribution,
    "sample": sample.sample,
    "tokens": sample.tokens_of,
    "group": sample.group,
    "triage": triage.triage,
    "config": compare.configuration,
    "compare": compare.compare,
    "time": curves.where_time_goes,
    "results": runs.results,
    "files": runs.files,
    "log": runs.log,
}
QUESTIONS = {f"/api/{name}": Question(answer) for name, answer in _ANSWERS.items()}


def ask(known: runs.Runs, path: str, parameters: Mapping[str, Any]) -> BaseModel:
    """Answer a query; empty parameters count as absent.

    Raises QuestionError for wrong parameters, NotThereError for what does not exist, another UserError otherwise.
    """
    question = QUESTIONS[path]
    try:
        asked = question.asked.model_validate({k: v for k, v in parameters.items() if v not in ("", None)})
    except ValidationError as error:
        raise QuestionError(_problem(error, question.asked)) from None
    return question.answer(known, asked)


def address(path: str, parameters: Mapping[str, Any]) -> str:
    """Return the canonical address of a query: parameters sorted by name, without empty ones."""
    pairs = sorted((name, str(value)) for name, value in parameters.items() if value not in ("", None))
    return f"{path}?{urlencode(pairs)}" if pairs else path


def _problem(error: ValidationError, asked: type[Asked]) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    known = ", ".join(field.alias or own for own, field in asked.model_fields.items())
    if first["type"] == "extra_forbidden":
        return f"{name}: no such parameter; there are {known or 'none'}"
    if first["type"] == "missing":
        return f"{name}: this parameter is missing; there are {known}"
    return f"{name}={first['input']}: {first['msg'][:1].lower()}{first['msg'][1:]}"
