"""view/src/api.ts says by hand what rlkit/view/schema.py answers: the same fields, null where that may be null."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest

from rlkit.view import schema
from rlkit.view.filter import SQL

VIEW = Path(__file__).parents[2] / "view" / "src"
SOURCE = (VIEW / "api.ts").read_text()
MODELS = {
    "Run": schema.RunInfo, "Runs": schema.RunList, "Columns": schema.Series, "Metrics": schema.MetricsResult,
    "Tile": schema.Tile, "Light": schema.Light, "Overview": schema.OverviewResult, "Summary": schema.SampleSummary,
    "Samples": schema.SamplesResult, "Histogram": schema.HistogramResult, "Part": schema.Part,
    "OneSample": schema.SampleResult, "Range": schema.Range, "Tokens": schema.TokensResult, "Group": schema.GroupResult,
    "Distribution": schema.DistributionResult, "Scatter": schema.ScatterResult, "Finding": schema.Finding,
    "Triage": schema.TriageResult, "Config": schema.ConfigResult, "Compare": schema.CompareResult,
    "Time": schema.TimeResult, "Files": schema.FilesResult, "Log": schema.LogResult, "Grew": schema.Event,
}  # fmt: skip


def fields(body: str) -> dict[str, str]:
    """Of an interface, those of its inner objects left out."""
    return {
        name: " ".join(text.split()) for name, text in re.findall(r"^  (\w+): (\{\n[\s\S]*?^  \}.*|.*);$", body, re.M)
    }


def interfaces() -> dict[str, dict[str, str]]:
    found = re.findall(r"^export interface (\w+)(?: extends \w+)? \{\n([\s\S]*?)^\}", SOURCE, re.M)
    return {name: fields(body) for name, body in found}


@pytest.mark.parametrize("name", MODELS)
def test_interface(name: str) -> None:
    expected: dict[str, Any] = {field.alias or own: field for own, field in MODELS[name].model_fields.items()}
    written = interfaces()[name]
    assert set(written) == set(expected)
    for field, text in written.items():
        nullable = NoneType in get_args(expected[field].annotation)
        assert bool(re.search(r"\| null$", text)) == nullable, f"{name}.{field}: {text}"


def test_help_lists_the_fields_of_the_filter() -> None:
    listed = re.findall(r'\["(numbers|texts|flags)", "(.*)"\]', (VIEW / "parts" / "Help.svelte").read_text())
    known: dict[str, set[str]] = {"numbers": set(), "texts": set(), "flags": set()}
    for name in SQL.keys() - {"finish_reason"}:  # another name of `finish`
        known[f"{SQL[name][1]}s"].add(name)
    assert {kind: set(names.split()) for kind, names in listed} == known
