"""A real run of the program in docs/agents.md, started anew for every episode."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from paths import ROOT
from run_fixture import Run

PAGE = (ROOT / "docs/agents.md").read_text()
(PROGRAM,) = re.findall(r"<!-- solver\.py -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
(COMMAND,) = re.findall(r"python -m rlkit\.train (environment=program.*?)\n```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
def test_the_program_of_the_docs_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "solver.py").write_text(PROGRAM)
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = shlex.split(COMMAND.replace("\\\n", " ").replace("[python,", f"[{sys.executable},"))
    run = Run(
        tmp_path, *words, "trainer.total_steps=1", "trainer.evaluation_prompts=2", cwd=tmp_path, without=("reward",)
    )
    try:
        assert run.end(400) == 0, run.text
        (step,) = [record for record in run.records() if record["kind"] == "step"]
        assert step["reward/failed"] == 0 and step["mismatch/logprob_max"] < 1e-3, step
        assert 1 <= step["environment/turns"] <= 2 and step["environment/observation_tokens"] > 0, step
        assert run.left_after(10) == []
    finally:
        run.clean_up()
