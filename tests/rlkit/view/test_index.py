"""The index follows its file: half lines, cuts, replaced files, damaged caches, several processes at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import make_run

from rlkit.view.index import SampleIndex
from rlkit.view.runs import Runs


def line(step: int, sample: int = 0, **more: Any) -> bytes:
    row = {"step": step, "group_id": f"g{step}", "prompt_id": "p", "sample": sample, "response": f"word{step}", **more}
    return json.dumps(row).encode() + b"\n"


def indexed(index: SampleIndex) -> list[tuple[int, int]]:
    """(id, step) of all rows."""
    assert index.follow()
    return index.connection().execute("SELECT id, step FROM rows ORDER BY id").fetchall()


def hits(index: SampleIndex, word: str) -> list[int]:
    found = index.connection().execute("SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY rowid", (word,))
    return [row for (row,) in found]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_half_a_line_waits_for_its_other_half(run: Path) -> None:
    file, whole = run / "samples.jsonl", line(2)
    file.write_bytes(line(1) + whole[:20])
    index = SampleIndex(run)
    assert indexed(index) == [(0, 1)]
    with file.open("ab") as stream:
        stream.write(whole[20:] + line(3))
    assert indexed(index) == [(0, 1), (1, 2), (2, 3)]
    assert index.raw(1) == json.loads(whole)
    assert hits(index, "word3") == [2]


def test_a_long_prompt_is_listed_with_its_end(run: Path) -> None:
    prompt = [{"role": "user", "content": "Instructions. " * 50 + "What is 3 + 4?"}]
    (run / "samples.jsonl").write_bytes(line(1, prompt=prompt))
    index = SampleIndex(run)
    indexed(index)
    (head,) = index.all("SELECT prompt FROM heads")
    assert head.startswith("Instructions.") and head.endswith("What is 3 + 4?") and len(head) < 210


def test_a_resumed_run_cuts_its_file_and_writes_on(run: Path) -> None:
    """Also beyond the place up to which the index had read, and with lines of the same lengths."""
    file = run / "samples.jsonl"
    file.write_bytes(line(1) + line(2) + line(3))
    index = SampleIndex(run)
    assert len(indexed(index)) == 3
    file.write_bytes(line(1))
    os.truncate(file, len(line(1)))
    assert indexed(index) == [(0, 1)]
    file.write_bytes(line(1) + line(7) + line(8) + line(9))
    assert indexed(index) == [(0, 1), (1, 7), (2, 8), (3, 9)]
    assert (hits(index, "word2"), hits(index, "word9")) == ([], [3])
    file.unlink()
    assert indexed(index) == []


def test_a_synchronised_copy_is_not_read_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another inode with the same beginning: only what is new is parsed."""
    file = run / "samples.jsonl"
    file.write_bytes(line(1) + line(2))
    index = SampleIndex(run)
    indexed(index)
    copy = run / ".samples.jsonl.tmp"
    copy.write_bytes(line(1) + line(2) + line(3))
    copy.rename(file)
    seen: list[int] = []
    import rlkit.view.index as module

    original = module.indexed
    monkeypatch.setattr(module, "indexed", lambda number, *rest: (seen.append(number), original(number, *rest))[1])
    assert indexed(index) == [(0, 1), (1, 2), (2, 3)]
    assert seen == [2]


def test_lines_that_are_no_rows_keep_their_numbers(run: Path) -> None:
    odd = {"group_id": "g\ud800", "reward": 1e400, "length": 10**400, "step": "x", "components": {"a": "NaN", "b": 2}}
    text = json.dumps({"step": 1, "response": None, "prompt": "plain"}).encode()
    lines = [b"", b"no json", b"[1]", text, json.dumps(odd).encode(), b"\xff\xfe", b'{"step": 5}']
    (run / "samples.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    index = SampleIndex(run)
    assert indexed(index) == [(3, 1), (4, 0), (6, 5)]
    row = index.connection().execute("SELECT reward, length, group_id FROM rows WHERE id = 4").fetchone()
    assert row == (None, None, "g?")
    assert list(index.names()["component"]) == ["b"]


def test_more_names_than_a_table_has_columns_leave_the_rest_in_the_file(run: Path) -> None:
    rows = [line(i, components={f"{i}/{j}": 1.0 for j in range(90)}) for i in range(12)]
    (run / "samples.jsonl").write_bytes(b"".join(rows[:1]))
    index = SampleIndex(run)
    indexed(index)
    first = index.names()["component"]
    with (run / "samples.jsonl").open("ab") as file:
        file.write(b"".join(rows[1:]))
    assert len(indexed(index)) == 12
    known = index.names()["component"]
    assert len(known) == 1000 and known.items() >= first.items() and len(first) == 90
    (value,) = index.all(f"SELECT {first['0/7']} FROM rows WHERE id = 0")
    assert value == 1.0
    assert index.raw(11) == json.loads(rows[11])


def test_full_text_knows_the_first_4096_characters(run: Path) -> None:
    (run / "samples.jsonl").write_bytes(line(1, response="early " + "x " * 3000 + "late"))
    index = SampleIndex(run)
    indexed(index)
    assert (hits(index, "early"), hits(index, "late")) == ([0], [])


def test_a_damaged_cache_is_made_anew(run: Path, cache: Path) -> None:
    (run / "samples.jsonl").write_bytes(line(1))
    index = SampleIndex(run)
    indexed(index)
    index.close()
    (file,) = (cache / "rlkit" / "view").glob("*.sqlite")
    for damage in (b"this is no database" * 100, b""):
        file.write_bytes(damage)
        again = SampleIndex(run)
        assert indexed(again) == [(0, 1)]
        again.close()


def test_many_runs_leave_few_files_open(tmp_path: Path, cache: Path) -> None:
    for name in map(str, range(40)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "samples.jsonl").write_bytes(line(1))
    runs = Runs([tmp_path / "runs"])
    for _ in range(2):
        assert [run.samples for run in runs.listed().runs] == [1] * 40
    links = Path("/proc/self/fd").iterdir()
    opened = [target for link in links if link.exists() and (target := str(link.readlink())).startswith(str(cache))]
    assert 1 <= len(set(opened)) <= 3 * 8  # each has its -wal and its -shm


def test_nothing_is_written_into_the_run(folder: Path, cache: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [folder, *folder.rglob("*")]}

    before = state()
    for run in Runs([folder]).all():
        run.index.follow()
        run.info()
    assert state() == before
    assert oct((cache / "rlkit" / "view").stat().st_mode)[-3:] == "700"


def test_without_a_writable_cache_a_temporary_folder_serves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "samples.jsonl").write_bytes(line(1))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert indexed(SampleIndex(run)) == [(0, 1)]


def test_token_files_and_rescored_rewards_come_and_go(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 512, rescored=True)
    index = SampleIndex(run)
    indexed(index)

    def count(table: str) -> int:
        return index.connection().execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    tokens = count("token_rows")
    assert tokens > 0
    assert list(index.names()["rescored"]) == ["strict"]
    column = index.names()["rescored"]["strict"]
    assert count(f"rows WHERE {column} IS NOT NULL") > 0
    sorted((run / "tokens").glob("*"))[0].unlink()
    (run / "rescored" / "strict.jsonl").write_text("{}\n")
    indexed(index)
    assert 0 < count("token_rows") < tokens
    assert count(f"rows WHERE {column} IS NOT NULL") == 0
    shutil.rmtree(run / "rescored")
    indexed(index)
    assert index.names()["rescored"] == {}


def _follow_until(run: Path, rows: int, cache: str, sums: Any) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    index, deadline = SampleIndex(run), time.monotonic() + 60
    found = (0, 0)
    while found[0] < rows and time.monotonic() < deadline:
        index.follow(1.0)
        found = index.connection().execute("SELECT count(*), total(step) FROM rows").fetchone()
    sums.put(found)


def test_several_processes_follow_one_run(run: Path, cache: Path) -> None:
    """While it grows; each ends with every row once, and the text index has every word once."""
    file, rows = run / "samples.jsonl", 2000
    context = multiprocessing.get_context("spawn")
    sums = context.Queue()
    file.touch()
    followers = [context.Process(target=_follow_until, args=(run, rows, str(cache), sums)) for _ in range(2)]
    for follower in followers:
        follower.start()
    with file.open("ab", buffering=0) as stream:
        for step in range(rows):
            whole = line(step)
            stream.write(whole[:10])
            stream.write(whole[10:])
            time.sleep(0.002 if step % 20 == 0 else 0)
    results = [sums.get(timeout=90) for _ in followers]
    for follower in followers:
        follower.join(10)
    assert results == [(rows, rows * (rows - 1) / 2)] * 2
    index = SampleIndex(run)
    indexed(index)
    assert hits(index, "word1999") == [1999]
