"""rlkit/config/metrics.yaml: every metric of the code has a row, every row is of one, the page has the rows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from pydantic import TypeAdapter, ValidationError

from rewards.base import RewardConfig
from rlkit.config.metric_table import VARIES, Rule, about, plain, rows, stands_for
from rlkit.config.schema import LearnerConfig, TrainerConfig

OWN_PAGES = [ROOT / "docs" / "rewards" / f"{name}.md" for name in ("preference", "training", "polar")]
"""Metrics of `python -m rlkit.train_reward`, which trains no policy."""
NO_METRICS = {
    "application/json", "ft/s", "km/h", "mi/h", "ray/ray_current_cluster", "rewards/services",
    "rewards/services/sandbox", "run/resumed_after", "tools/list",
}  # fmt: skip
"""Texts of that form in code which name none."""
READERS = ("config", "view")
"""Packages of rlkit that report no metric themselves."""
TREES = {
    file: ast.parse(file.read_text())
    for folder in ("rlkit", "algorithms", "rewards")
    for file in (ROOT / folder).rglob("*.py")
}
REPORTING = [
    tree for file, tree in TREES.items() if file.relative_to(ROOT).parts[:2] not in [("rlkit", r) for r in READERS]
]


def texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "timed":
            yield f"time/{ast.literal_eval(node.args[0])}"


def test_every_metric_that_code_names_has_a_row() -> None:
    named = {
        (text, str(file.relative_to(ROOT)))
        for file, tree in TREES.items()
        for text in texts(tree)
        if re.fullmatch(r"[a-z_]+(/[a-z_0-9]+)+(?<!_)", text) and text not in NO_METRICS
    }
    assert len(named) > 150
    pages = "".join(page.read_text() for page in OWN_PAGES)
    without = sorted(f"{name} ({file})" for name, file in named if not has_row(name) and f"`{name}`" not in pages)
    assert not without, f"explain these in rlkit/config/metrics.yaml: {', '.join(without)}"


def has_row(metric: str) -> bool:
    return any(stands_for(name, metric) for row in rows() for name in row.names)


def test_every_row_is_of_a_metric_that_code_reports() -> None:
    """As it stands there, or put together: `f"{self.area}/loss"` with an area that is named somewhere."""
    known = {text for tree in REPORTING for text in texts(tree)}
    patterns = {
        "".join(re.escape(str(v.value)) if isinstance(v, ast.Constant) else "(.+)" for v in node.values)
        for tree in REPORTING
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
    }
    composed = [re.compile(pattern) for pattern in patterns if len(re.findall("[a-z]", pattern)) > 2]

    def reported(name: str) -> bool:
        fixed, *varies = VARIES.split(name)
        if name in known or (varies and (not fixed or fixed.rpartition("/")[2] in known)):
            return True
        matches = [match for pattern in composed if (match := pattern.fullmatch(name)) is not None]
        return any(all(map(reported, match.groups())) for match in matches)

    unknown = [name for row in rows() for name in row.names if not reported(name)]
    assert unknown == []


def test_the_page_has_the_rows(tmp_path: Path) -> None:
    page, copy = ROOT / "docs" / "metrics.md", tmp_path / "metrics.md"
    copy.write_text(page.read_text().replace("in nats", "in bits"))
    subprocess.run([sys.executable, "docs/making/metric_tables.py", str(copy)], check=True, cwd=ROOT, timeout=60)
    assert copy.read_text() == page.read_text(), "run: python docs/making/metric_tables.py docs/metrics.md"
    copy.write_text(page.read_text().replace("<!-- metrics: time -->", ""))
    again = [sys.executable, "docs/making/metric_tables.py", str(copy)]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "<!-- metrics: NAME -->: ['time']" in done.stderr


def test_names_are_there_once_and_lead_to_their_row() -> None:
    names = [name for row in rows() for name in row.names]
    assert len(names) == len(set(names)) > 150
    for row in rows():
        assert all(about(name) is row for name in row.names)
    assert about("evaluation/pass@8").names[0] == "evaluation/pass@<k>"
    assert about("evaluation/hard/pass@8").names[0] == "evaluation/NAME/accuracy"
    assert about("reward/failed/timeout") is about("reward/failed")
    with pytest.raises(KeyError):
        about("reward/failed/")
    assert plain("see `a` in [b](c.md)") == "see a in b"


def test_thresholds_name_keys_that_exist() -> None:
    lights = [row.light for row in rows() if row.light is not None]
    assert len({light.id for light in lights}) == len(lights) > 10
    sections = {"trainer": TrainerConfig, "learner": LearnerConfig, "reward": RewardConfig}
    for bound in (bound for light in lights for bound in (*light.look, *light.act) if bound.key):
        section, _, key = bound.key.partition(".")
        assert key in sections[section].model_fields, bound.key


@pytest.mark.parametrize(
    "text", ["over 1", "above", "above x", "above 0.9 trainer.max_staleness", "above 2 x 3", "above 1 and below 0"]
)
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a bound: `above 0"):
        TypeAdapter(Rule).validate_python({"id": "x", "title": "x", "look": text})
