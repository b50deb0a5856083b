"""A wheel works from any folder: the option files and the embedded models are inside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

from rlkit.config.parts import conf_dir


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources (setuptools leaves a build folder beside them)."""
    root = ROOT
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(root / name, source)
    for name in ("rlkit", "rewards", "algorithms", "conf"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=120)
    (built,) = out.glob("rlkit-*.whl")
    return built


def test_wheel_holds_all_that_a_run_needs(wheel: Path, repository: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for file in (repository / "conf").rglob("*.yaml"):
        assert f"rlkit/conf/{file.relative_to(repository / 'conf')}" in inside
    for package in ("rlkit", "rewards", "algorithms"):
        for file in (repository / package).rglob("*.py"):
            assert str(file.relative_to(repository)) in inside
    for file in (repository / "rlkit" / "embedded").rglob("*"):
        if file.suffix in (".safetensors", ".json", ".jinja"):
            assert str(file.relative_to(repository)) in inside
    assert not any(name.startswith(("tests/", "conf/", "benchmarks/")) for name in inside)


def test_installed_wheel_works_from_another_folder(wheel: Path, bare_model: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, timeout=120)

    def run(*arguments: str | Path) -> str:
        command = [sys.executable, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(target)}
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    planned = run("-m", "rlkit.train", "dry_run=true", "reward=rule", f"model.path={bare_model}")
    assert "algorithms.grpo.GRPO" in planned
    assert "train" in run(target / "bin" / "rlkit", "--help")
    found = run("-c", "from rlkit.config.parts import conf_dir; print(conf_dir())")
    assert Path(found.strip()) == target / "rlkit" / "conf"


def test_checkout_uses_its_own_option_files(repository: Path) -> None:
    assert conf_dir() == repository / "conf"
