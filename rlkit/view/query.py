"""The questions that can be asked of runs: what http.py, report.py and text.py have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel, RootModel, ValidationError

from rlkit.experience import UserError
from rlkit.view import compare, curves, files, sample, samples, schema, triage
from rlkit.view.asked import (
    AboutRun,
    AboutRuns,
    Asked,
    DistributionAsked,
    GroupAsked,
    HistogramAsked,
    LogAsked,
    MetricsAsked,
    SampleAsked,
    SamplesAsked,
    ScatterAsked,
    TokensAsked,
)
from rlkit.view.runs import NotThereError, Run, Runs

PATIENCE_SECONDS = 1.0
"""How long an answer waits for the index of a file that has grown; it goes on in the background."""
A = TypeVar("A", bound=AboutRun)


class Results(RootModel[dict[str, Any]]):
    """results.json of an evaluation."""


@dataclass(frozen=True)
class Question:
    asked: type[Asked]
    result: type[BaseModel]
    answer: Callable[[Runs, Any], BaseModel]

    @property
    def about(self) -> str:
        """For the schema."""
        return (self.answer.__doc__ or self.result.__doc__ or "").strip()


class QuestionError(UserError):
    """A parameter is missing, unknown or wrong."""


def _of_run(answer: Callable[[Run, A], BaseModel]) -> Callable[[Runs, A], BaseModel]:
    def of_runs(runs: Runs, asked: A) -> BaseModel:
        run = runs.get(asked.run)
        run.index.follow(PATIENCE_SECONDS)
        return answer(run, asked)

    of_runs.__doc__ = answer.__doc__
    return of_runs


def _listed(runs: Runs, asked: Asked) -> schema.RunList:
    """All runs, and how they stand."""
    del asked
    return runs.listed()


def _named(runs: Runs, names: str) -> list[Run]:
    chosen = [runs.get(name) for name in names.split(",") if name] or runs.all()
    for run in chosen:
        run.index.follow(PATIENCE_SECONDS)
    return chosen


def _configuration(runs: Runs, asked: AboutRuns) -> schema.ConfigResult:
    """Every key of config.yaml, the differing ones first."""
    return compare.configuration(_named(runs, asked.runs))


def _comparison(runs: Runs, asked: AboutRuns) -> schema.CompareResult:
    """Differences are the last run's values minus the first's, with intervals where there are pairs."""
    return compare.compare(_named(runs, asked.runs), asked)


def _results(run: Run, asked: AboutRun) -> Results:
    """results.json of an evaluation."""
    del asked
    results = run.results
    if results is None:
        raise NotThereError(f"run {run.id!r} has no results.json: it is no evaluation, or one that has not ended")
    return Results(results)


QUESTIONS: Mapping[str, Question] = {
    "/api/runs": Question(Asked, schema.RunList, _listed),
    "/api/metrics": Question(MetricsAsked, schema.MetricsResult, _of_run(curves.metrics)),
    "/api/overview": Question(AboutRun, schema.OverviewResult, _of_run(curves.overview)),
    "/api/health": Question(AboutRun, schema.HealthResult, _of_run(curves.health)),
    "/api/samples": Question(SamplesAsked, schema.SamplesResult, _of_run(samples.samples)),
    "/api/histogram": Question(HistogramAsked, schema.HistogramResult, _of_run(samples.histogram)),
    "/api/scatter": Question(ScatterAsked, schema.ScatterResult, _of_run(samples.scatter)),
    "/api/distribution": Question(DistributionAsked, schema.DistributionResult, _of_run(samples.distribution)),
    "/api/sample": Question(SampleAsked, schema.SampleResult, _of_run(sample.sample)),
    "/api/tokens": Question(TokensAsked, schema.TokensResult, _of_run(sample.tokens_of)),
    "/api/group": Question(GroupAsked, schema.GroupResult, _of_run(sample.group)),
    "/api/triage": Question(AboutRun, schema.TriageResult, _of_run(triage.triage)),
    "/api/config": Question(AboutRuns, schema.ConfigResult, _configuration),
    "/api/compare": Question(AboutRuns, schema.CompareResult, _comparison),
    "/api/time": Question(AboutRun, schema.TimeResult, _of_run(curves.where_time_goes)),
    "/api/results": Question(AboutRun, Results, _of_run(_results)),
    "/api/files": Question(AboutRun, schema.FilesResult, _of_run(files.files)),
    "/api/log": Question(LogAsked, schema.LogResult, _of_run(files.log)),
}


def ask(runs: Runs, path: str, parameters: Mapping[str, Any]) -> BaseModel:
    """The answer to a question; empty parameters count as absent.

    Raises QuestionError for wrong parameters, NotThereError for what does not exist, another UserError otherwise.
    """
    question = QUESTIONS[path]
    given = {name: value for name, value in parameters.items() if value not in ("", None)}
    try:
        asked = question.asked.model_validate(given)
    except ValidationError as error:
        raise QuestionError(_problem(error, question.asked)) from None
    return question.answer(runs, asked)


def address(path: str, parameters: Mapping[str, Any]) -> str:
    """One spelling for equal questions: parameters by name, empty ones left out."""
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
