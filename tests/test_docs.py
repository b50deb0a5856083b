"""Every command in the README and the docs parses and validates, so that none goes stale."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TRAIN = "python -m rlkit.train"


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a bash block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.partition(" #")[0].strip()) for line in lines if line.strip()]
    return found


@pytest.mark.parametrize(("page", "command"), [c for c in commands() if c[1].startswith(TRAIN)])
def test_training_commands_validate(page: str, command: str, tmp_path: Path) -> None:
    if "../shared" in command and not (ROOT / "../shared/data").is_dir():
        pytest.skip("needs ../shared/data beside the project")
    arguments = shlex.split(command)[3:]
    if "--help" not in arguments:
        arguments += ["dry_run=true", *([] if "run_dir=" in command else [f"run_dir={tmp_path / 'run'}"])]
    done = subprocess.run(
        [sys.executable, "-m", shlex.split(command)[2], *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{page}: {command}\n{done.stdout}\n{done.stderr}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {word for _, line in commands() for word in re.findall(r"^make (\w+)", line)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_linked_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_other_modules_named_in_commands_exist() -> None:
    for page, command in commands():
        for module in re.findall(r"python -m (rlkit[.\w]*)", command):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists(), f"{page}: {command}"
        for script in re.findall(r"python ((?:benchmarks|examples)/\S+\.py)", command):
            assert (ROOT / script).exists(), f"{page}: {command}"
