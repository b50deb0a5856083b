"""Ranks of `rlkit.train_reward`: when one fails, dies or hangs, all end soon, with the cause."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from paths import PYTHONPATH, ROOT
from prm_fixture import write_chat_model, write_rollouts

from rlkit.reward_training.ranks import join_ranks, naming_a_hang, run_ranks

LIMIT = "rank_timeout_seconds"


def behave(rank: int, port: int, folder: Path, others: str, last: str) -> int:
    """The last of the ranks does `last`, the others do `others`."""
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    does = last if rank == 1 else others
    if does.startswith("exit"):
        return int(does.split()[1])
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(120)
    return 0


def living(folder: Path) -> list[int]:
    pids = [int(file.read_text()) for file in folder.glob("*.pid")]
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("others", "last", "code", "said"),
    [
        pytest.param("exit 0", "exit 0", 0, "", marks=pytest.mark.slow),
        pytest.param("sleep", "exit 3", 3, "", marks=pytest.mark.slow),
        pytest.param(
            "sleep", "die", 1, "rlkit: rank 1 was ended by SIGKILL; ending the others\n", marks=pytest.mark.slow
        ),
        pytest.param(
            "exit 0",
            "stop",
            1,
            "rlkit: rank 1 has not ended 2 s (rank_timeout_seconds) after the first one did",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_end_together(
    others: str,
    last: str,
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlkit.reward_training.ranks.END_SECONDS", 2.0)
    began = time.monotonic()
    assert run_ranks(2, 2.0, LIMIT, behave, tmp_path, others, last) == code
    assert time.monotonic() - began < 60
    assert living(tmp_path) == []
    error = capsys.readouterr().err
    assert said in error if said else error == ""


def test_a_single_rank_runs_in_this_process(tmp_path: Path) -> None:
    assert run_ranks(1, 2.0, LIMIT, behave, tmp_path, "exit 5", "") == 5
    assert (tmp_path / "0.pid").read_text() == str(os.getpid())


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_they_end_with_their_parent(number: int, code: int, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from test_ranks import *\n"
        "if __name__ == '__main__': sys.exit(run_ranks(2, 60, LIMIT, behave, Path(sys.argv[1]), 'sleep', 'sleep'))"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{PYTHONPATH}"}
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    parent = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 2 and len(living(tmp_path)) == 2, 60)
        os.kill(parent.pid, number)
        assert parent.wait(30) == code
        until(lambda: not living(tmp_path), 10)
    finally:
        parent.kill()


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def meet(rank: int, port: int, which: str) -> int:
    """Rank 1 stops before a collective operation of the world, or of a group as DeepSpeed makes them."""
    join_ranks(rank, 2, port, "cpu", 1, 0, 3.0)
    import torch
    import torch.distributed as dist

    group = dist.new_group([0, 1]) if which == "a group's" else None
    dist.barrier()
    if rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    began = time.monotonic()
    try:
        with naming_a_hang(rank, 2, 3.0, LIMIT):
            dist.all_reduce(torch.ones(2), group=group)
    except RuntimeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return 7 if 2.0 < time.monotonic() - began < 20 else 8


@pytest.mark.slow
@pytest.mark.parametrize("which", ["the world's", "a group's"])
def test_a_rank_that_hangs_in_a_collective_operation_ends_all(
    which: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlkit.reward_training.ranks.END_SECONDS", 2.0)
    assert run_ranks(2, 3.0, LIMIT, meet, which) == 7
    assert f"RankHangsError: rank 0 waited more than {LIMIT}=3 s for another rank" in capfd.readouterr().err
    assert multiprocessing.active_children() == []


ENDLESS = ["threads=1", "reward.steps=100000", "reward.batch_size=10", "rank_timeout_seconds=8", "reward.ranks=2"]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["SIGKILL", "SIGSTOP"])
def test_a_training_does_not_outlast_a_rank(trouble: str, tmp_path: Path) -> None:
    own = [f"data.path={write_rollouts(tmp_path / 'rows.jsonl')}"]
    own += [f"reward.model_path={write_chat_model(tmp_path / 'model')}", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "rlkit.train_reward", *ENDLESS, *own]
    with (tmp_path / "error").open("w") as error:
        run = subprocess.Popen(command, stdout=error, stderr=error, cwd=ROOT)
    family = []
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 180)
        family = psutil.Process(run.pid).children(recursive=True)
        ranks = [process for process in family if "spawn_main" in " ".join(process.cmdline())]
        assert len(ranks) == 2
        ranks[1].send_signal(getattr(signal, trouble))
        assert run.wait(60) == 1
        text = (tmp_path / "error").read_text()
        if trouble == "SIGKILL":
            assert "rlkit: rank 1 was ended by SIGKILL; ending the others\n" in text
        else:
            assert "rlkit: rank 0 waited more than rank_timeout_seconds=8 s for another rank" in text
        psutil.wait_procs(family, 10)
        assert not [process for process in family if process.is_running()]
    finally:
        for process in [*family, run]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        run.wait(10)
