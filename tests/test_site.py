"""The documentation site: its generated pages, the tables for users of other frameworks, and that it builds."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT

from rlkit.config.compose import group_options
from rlkit.config.parts import conf_dir
from rlkit.config.reference import pages

GENERATED = pages()
KEYS = {key for text in GENERATED.values() for key in re.findall(r"^`([\w.]+)`$", text, flags=re.MULTILINE)}
TABLES = runpy.run_path(str(ROOT / "docs/making/tables.py"))
FROM = sorted((ROOT / "docs" / "from").glob("*.md"))


def test_every_option_has_a_page_that_says_what_it_sets() -> None:
    for group, options in group_options(conf_dir()).items():
        for option in options if options != ["default"] and group != "verifier" else ():
            assert f"{group}/{option}.md" in GENERATED
    dapo = GENERATED["algorithm/dapo.md"]
    assert "2503.14476" in dapo and "- `algorithm.clip_high=0.28`" in dapo
    assert "`learner.learning_rate`\n:   a number" in GENERATED["learner.md"]


@pytest.mark.parametrize(("name", "page"), TABLES["PAGES"].items())
def test_the_tables_of_other_frameworks_keys_are_those_that_answer(name: str, page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert TABLES["table"](name) in text, "python docs/making/tables.py writes it"
    assert TABLES["with_table"](text, name) == text


@pytest.mark.parametrize("page", FROM, ids=lambda page: page.stem)
def test_what_other_frameworks_keys_become_exists(page: Path) -> None:
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    checked = 0
    for _, _, here, remark, _ in rows[1:]:
        for words in re.findall(r"`([^`]+)`", here):
            for word in words.split():
                checked += check(word)
        for word in re.findall(r"`([\w.]+=[\w.\[\]]+)`", remark):
            checked += check(word)
    assert checked > 20


def check(word: str) -> bool:
    """`key`, `key=value` or `group=option`; what names no key of ours is skipped."""
    key, _, value = word.partition("=")
    options = group_options(conf_dir())
    if key in options:
        assert value == "NAME" or value in options[key] or value.startswith("["), f"{word}: no such option"
    else:
        part = re.sub(r"^(reward\.parts)\.[a-z]\w*", r"\1.NAME", key)
        assert part in KEYS or key.endswith("_target_"), f"{word}: no such key"
    return True


def test_the_navigation_has_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = set(re.findall(r"[\w/]+\.md", str(config["nav"])))
    written = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert named == {page for page in written if not page.startswith("reference/")} | {"reference/index.md"}


def test_the_site_builds_without_a_broken_link_and_asks_no_other_host(tmp_path: Path) -> None:
    program = shutil.which("zensical", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs zensical (the extra dev)")
    for name in ("docs", "mkdocs.yml"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    (tmp_path / "rlkit").symlink_to(ROOT / "rlkit")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'docs/making'}"}
    for command in ([sys.executable, "docs/making/pages.py"], [program, "build", "--strict"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site/reference/algorithm/grpo/index.html").is_file()
    assert "Tutorial" in (tmp_path / "site/llms.txt").read_text()
    page = (tmp_path / "site/algorithms/index.html").read_text()
    assert "</math>" in page and "$\\" not in page
    loaded = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(https?:[^"'> ]+)""", page)
    assert not [url for url in loaded if "rel=canonical" not in url]
