"""The report as one file, the view in the terminal, the commands, and what they do not load."""

from __future__ import annotations

import base64
import gzip
import json
import re
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from synthetic_run import make_run

from rlkit.report import main as report
from rlkit.view import http as http_module
from rlkit.view import report as report_module
from rlkit.view.__main__ import main as view
from rlkit.view.query import address, ask
from rlkit.view.runs import Runs
from rlkit.view.text import show


def embedded(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/gzip" id="report">(.*?)</script>', text, flags=re.DOTALL)
    content: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(data, validate=True)))
    return content


def test_a_report_holds_the_answers_of_the_server(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "first.html"
    assert report([str(folder / "first"), "--out", str(out)]) == 0
    assert "512 of 512 samples" in capsys.readouterr().out
    found, runs = embedded(out)["results"], Runs([folder / "first"])
    for path, asked in (
        ("/api/overview", {}),
        ("/api/results", {}),
        ("/api/distribution", {"key": "reward", "bins": 30}),
        ("/api/histogram", {"key": "length", "bins": 40}),
    ):
        same = json.loads(ask(runs, path, {"run": "first", **asked}).model_dump_json())
        assert found[address(path, {"run": "first", **asked})].keys() == same.keys()
    rows = found["/api/samples?run=first"]
    assert (rows["total"], len(rows["rows"])) == (512, 512)
    one = found["/api/sample?id=7&run=first"]
    assert "token_ids" not in one["row"]
    assert one["summary"] == rows["rows"][7]
    page = out.read_text()
    assert page.count("<script") == page.count("</script>")  # no text of a model ends a script
    assert "connect-src &#x27;none&#x27;" in page


def test_a_small_report_keeps_whole_groups(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, size = tmp_path / "main.html", 0.9
    assert report([str(folder / "main"), "--out", str(out), "--max-mb", str(size)]) == 0
    assert "leaves no room for more" in capsys.readouterr().out
    assert out.stat().st_size <= size * 1e6
    content = embedded(out)
    rows = content["results"]["/api/samples?run=main"]["rows"]
    assert 0 < len(rows) == content["kept"] < content["samples"] == 1024
    assert len(rows) % 8 == 0
    findings = content["results"]["/api/triage?run=main"]["findings"]
    suspects = next(finding["rows"] for finding in findings if finding["rows"])
    assert suspects[0]["id"] in {row["id"] for row in rows}
    assert report([str(folder / "main"), "--out", str(out), "--max-mb", "0.23"]) == 1
    assert "--max-mb 0.23: too small" in capsys.readouterr().err


def test_reports_that_cannot_be_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report([str(folder)]) == 1
    assert "holds 4 runs: name one of them" in capsys.readouterr().err
    assert report([str(tmp_path / "none")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert report([str(folder / "first"), "--out", str(tmp_path / "none" / "x.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(report_module, "PAGE", tmp_path / "page.html")
    assert report([str(folder / "first")]) == 1
    assert "page.html is missing" in capsys.readouterr().err
    monkeypatch.setattr(http_module, "PAGE", tmp_path / "page.html")
    assert "has no page" in http_module.page_text()


def test_the_terminal_shows_state_lights_and_suspicions(folder: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "odd", 512, seed=1)
    file = tmp_path / "odd" / "samples.jsonl"
    last = json.loads(file.read_text().splitlines()[-1])
    with file.open("a") as stream:
        stream.write(json.dumps(last | {"response": "\x1b[2J[bold]red[/bold]\nnext"}) + "\n")
    out = StringIO()
    show(Runs([folder / "main", tmp_path / "odd"]), Console(file=out, width=120, force_terminal=False))
    text = out.getvalue()
    assert "ended after step 8 of 8" in text
    assert "held-out accuracy" in text
    assert "sampler and learner agree" in text
    assert "wrong answers among the best-rewarded" in text
    assert "[bold]red[/bold] next" in text  # as it is
    assert "\x1b" not in text


def test_wrong_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert view([str(tmp_path)]) == 1
    assert "a run folder has metrics.jsonl, samples.jsonl or results.json" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").touch()
    for words, said in {
        ("--port", "70000"): "--port 70000: ports are 1 to 65535",
        ("--host", "no-such-host.invalid"): "--host no-such-host.invalid: there is no such host",
    }.items():
        monkeypatch.setenv("RLKIT_VIEW_TOKEN", "a-token-of-24-characters")
        assert view([str(tmp_path), *words]) == 1
        assert said in capsys.readouterr().err
    monkeypatch.setenv("RLKIT_VIEW_TOKEN", "short")
    assert view([str(tmp_path)]) == 1
    assert "at least 16 ASCII characters" in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_end(folder: Path) -> None:
    """And loads nothing that a laptop without training packages lacks."""
    code = (
        "import sys, threading, rlkit.view.__main__ as view\n"
        "status = view.main(sys.argv[1:])\n"
        "print('loaded', sorted({'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'hydra'} & set(sys.modules)))\n"
        "sys.exit(status)"
    )
    arguments = [str(folder), "--port", "0", "--token"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        link = process.stdout.readline().removeprefix("open in a browser: ").strip()
        assert "?token=" in link
        with httpx.Client(timeout=30) as client:
            page = client.get(link)
            assert page.status_code == 200
            base = link.partition("?")[0]
            assert len(client.get(base + "api/runs").json()["runs"]) == 4
            assert client.get(base + "api/triage?run=main").status_code == 200
            assert client.get(base + "api/tokens?run=main&id=3").status_code == 200
        assert httpx.get(base + "api/runs").status_code == 401
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "loaded []" in rest
