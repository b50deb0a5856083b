"""What model-written code tries in a sandbox, and that nothing of it gets out or stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from paths import FIXTURES
from sandbox_fixture import LIMITS, impatient, need_bubblewrap, run, sandbox  # noqa: F401

from rewards.services.sandbox import Unavailable
from rewards.services.sandbox import bubblewrap as layout
from rewards.services.sandbox.bubblewrap import Bubblewrap


def test_a_program_runs(sandbox: Bubblewrap) -> None:  # noqa: F811
    done = run(sandbox, "import sys\nprint(int(input()) * 2)\nprint('ä', file=sys.stderr)\nexit(3)", "21\n")
    assert (done.ended, done.exit_code, done.stdout, done.stderr) == ("exit", 3, b"42\n", "ä\n")


def processes_in(marker: str) -> list[psutil.Process]:
    """Processes of this machine, whatever namespace they are in, that have the marker in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if marker in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_gone(marker: str) -> None:
    """Nothing with this marker runs any more; the kernel may take a moment."""
    end = time.monotonic() + 10.0
    while processes_in(marker):
        assert time.monotonic() < end, f"left behind: {processes_in(marker)}"
        time.sleep(0.05)


def sleeper(marker: str) -> str:
    """A command line that sleeps under a name that can be found from outside."""
    return f"[sys.executable, '-c', 'import time; time.sleep(500)', {marker!r}]"


def test_fork_bomb(sandbox: Bubblewrap, impatient: Bubblewrap) -> None:  # noqa: F811
    bomb = """
        import os, time
        made, refused = 0, None
        while made < 500:
            try:
                child = os.fork()
            except OSError as error:
                refused = error
                break
            if child == 0:
                time.sleep(500)
            made += 1
        print(made, type(refused).__name__)
    """
    done = run(sandbox, textwrap.dedent(bomb))
    made, refused = done.stdout.decode().split()
    assert int(made) < LIMITS.processes and refused == "BlockingIOError"
    before = len(psutil.pids())
    assert run(impatient, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass").ended == "timeout"
    assert len(psutil.pids()) < before + 50, "what it forked is gone"


def test_threads_are_limited_like_processes(sandbox: Bubblewrap) -> None:  # noqa: F811
    code = """
        import threading, time
        try:
            while True:
                threading.Thread(target=time.sleep, args=(500,), daemon=True).start()
        except RuntimeError as error:
            print(threading.active_count(), error)
    """
    count, error = run(sandbox, textwrap.dedent(code)).stdout.decode().split(maxsplit=1)
    assert int(count) <= LIMITS.processes and "can't start new thread" in error


@pytest.mark.parametrize("code", ["x = 'x' * 10**10", "x = []\nwhile True: x.append(bytearray(10**6))"])
def test_memory_bomb(sandbox: Bubblewrap, code: str) -> None:  # noqa: F811
    done = run(sandbox, code)
    assert done.exit_code == 1 and "MemoryError" in done.stderr


def test_infinite_loop_ends_by_cpu_time() -> None:
    need_bubblewrap()
    strict = Bubblewrap(replace(LIMITS, cpu_seconds=1, wall_seconds=90.0), side_by_side=1)
    strict.start()
    done = run(strict, "while True: pass")
    strict.close()
    assert (done.ended, done.exit_code) == ("timeout", 128 + signal.SIGXCPU)


def test_waiting_ends_by_the_wall_clock_and_signals_cannot_be_ignored(impatient: Bubblewrap) -> None:  # noqa: F811
    code = """
        import os, signal, subprocess, sys, time
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        subprocess.Popen(COMMAND, start_new_session=True)
        os.close(1); os.close(2)  # nothing to read from it is not the same as its end
        time.sleep(500)
    """
    start = time.monotonic()
    done = run(impatient, textwrap.dedent(code).replace("COMMAND", sleeper("ignores-all-signals")))
    assert done.ended == "timeout"
    assert time.monotonic() - start < 30
    assert_gone("ignores-all-signals")


def test_infinite_recursion(sandbox: Bubblewrap, impatient: Bubblewrap) -> None:  # noqa: F811
    assert "RecursionError" in run(sandbox, "def f(): f()\nf()").stderr
    crash = run(impatient, "import sys; sys.setrecursionlimit(10**9)\ndef f(): [f() for _ in 'x']\nf()")
    assert crash.ended in ("exit", "timeout") and crash.exit_code != 0


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_flood(sandbox: Bubblewrap, stream: str) -> None:  # noqa: F811
    code = f"import sys\nwhile True: sys.{stream}.write('x' * 10**6)"
    memory = psutil.Process().memory_info().rss
    done = run(sandbox, code)
    assert done.ended == "output"
    assert len(done.stdout) <= LIMITS.output_kib * 1024 and len(done.stderr) <= LIMITS.output_kib * 1024
    assert psutil.Process().memory_info().rss < memory + 50 * 2**20


def test_files_only_in_its_own_folder_and_gone_with_it(sandbox: Bubblewrap) -> None:  # noqa: F811
    code = """
        import json, os
        written = []
        for folder, _, _ in os.walk("/"):
            if folder.startswith(("/proc/self/task", "/proc/1", "/proc/2")):
                continue
            try:
                with open(os.path.join(folder, "written"), "w"):
                    written.append(folder)
            except OSError:
                pass
        print(json.dumps(written))
    """
    assert json.loads(run(sandbox, textwrap.dedent(code)).stdout) == ["/tmp"]
    assert run(sandbox, "import os; print(os.listdir('/tmp'))").stdout == b"[]\n", "every run has a new one"
    assert run(sandbox, "import os; os.chdir('/usr'); open('x', 'w')").exit_code == 1


def test_files_are_limited_each_and_together(sandbox: Bubblewrap) -> None:  # noqa: F811
    each = "f = open('big', 'wb')\nwhile True: f.write(bytes(10**6)); f.flush()"
    assert run(sandbox, each).exit_code != 0
    together = "for i in range(1000): open(str(i), 'wb').write(bytes(10**6))"
    done = run(sandbox, together)
    assert done.exit_code == 1 and "No space left" in done.stderr


def test_nothing_can_be_deleted(sandbox: Bubblewrap, tmp_path: Path) -> None:  # noqa: F811
    kept = tmp_path / "kept"
    kept.write_text("kept")
    os.chmod(kept, 0o777)  # noqa: PTH101
    code = f"""
        import os, shutil, sys
        shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)
        for folder in (sys.prefix, "/inside", "/usr/lib"):
            shutil.rmtree(folder, ignore_errors=True)
        print(os.path.exists(sys.executable), os.listdir("/inside"))
    """
    assert run(sandbox, textwrap.dedent(code)).stdout == b"True ['rewards']\n"
    assert kept.read_text() == "kept"


def test_secrets_cannot_be_read(sandbox: Bubblewrap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("SECRET_TOKEN", "do-not-tell")
    secret = tmp_path / "secret"
    secret.write_text("do-not-tell")
    os.chmod(secret, 0o644)  # noqa: PTH101
    code = f"""
        import json, os
        found = {{"environment": dict(os.environ), "files": [], "processes": []}}
        for path in ({str(secret)!r}, "/etc/passwd", "/etc/shadow", "/root/.bashrc", "/root/.ssh", {str(Path.cwd())!r}):
            if os.path.exists(path):
                found["files"].append(path)
        for number in [name for name in os.listdir("/proc") if name.isdigit()]:
            for name in ("environ", "cmdline", "mem"):
                try:
                    with open(f"/proc/{{number}}/{{name}}", "rb") as file:
                        text = file.read(10**6)
                except OSError:
                    continue
                if b"do-not-tell" in text or b"SECRET_TOKEN" in text:
                    found["processes"].append(number)
            found.setdefault("seen", []).append(number)
        print(json.dumps(found))
    """
    found = json.loads(run(sandbox, textwrap.dedent(code)).stdout)
    assert found["files"] == [] and found["processes"] == []
    assert len(found["seen"]) == 2, "bubblewrap's own process and the program"
    assert "SECRET_TOKEN" not in found["environment"]
    assert set(found["environment"]) <= {*layout._ENVIRONMENT, "PWD", "LC_CTYPE"}


def test_there_is_no_network(sandbox: Bubblewrap) -> None:  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0rlkit-test-of-sandboxes")
        local.listen()
        code = f"""
            import socket
            def refused(family, address):
                try:
                    socket.socket(family, socket.SOCK_STREAM).connect(address)
                except OSError as error:
                    return type(error).__name__
                return "connected"
            print(refused(socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})))
            print(refused(socket.AF_INET, ("192.0.2.1", 80)))
            print(refused(socket.AF_UNIX, "\\0rlkit-test-of-sandboxes"))
            try:
                print(socket.getaddrinfo("example.org", 80))
            except OSError as error:
                print(type(error).__name__)
        """
        lines = run(sandbox, textwrap.dedent(code)).stdout.decode().split()
    assert lines == ["ConnectionRefusedError", "OSError", "ConnectionRefusedError", "gaierror"]


def test_nothing_stays_behind(sandbox: Bubblewrap) -> None:  # noqa: F811
    code = """
        import os, subprocess, sys
        subprocess.Popen(COMMAND, start_new_session=True, stdin=subprocess.DEVNULL)
        if os.fork() == 0:  # a daemon: two forks, a session of its own
            os.setsid()
            if os.fork() == 0:
                os.execv(sys.executable, COMMAND)
            os._exit(0)
        for _ in range(3):  # zombies: children that nobody waits for
            if os.fork() == 0:
                os._exit(0)
        print("done", flush=True)
    """
    start = time.monotonic()
    done = run(sandbox, textwrap.dedent(code).replace("COMMAND", sleeper("left-behind")))
    assert done.stdout == b"done\n" and done.exit_code == 0
    assert time.monotonic() - start < 15, "the daemon holds the pipes open, which must not keep us waiting"
    assert_gone("left-behind")
    zombies = [child for child in psutil.Process().children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]
    assert zombies == []


def test_the_sandbox_dies_with_its_parent(tmp_path: Path) -> None:
    need_bubblewrap()
    script = f"""
        import sys, time
        sys.path[:0] = [{str(FIXTURES)!r}]
        from sandbox_fixture import LIMITS, Bubblewrap, run
        sandbox = Bubblewrap(LIMITS, 1)
        sandbox.start()
        print("started", flush=True)
        run(sandbox, {"import subprocess, sys; subprocess.run(" + sleeper("orphan-of-a-reward") + ")"!r})
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
    end = time.monotonic() + 30
    # The parent's own command line holds the marker, too.
    while len(processes_in("orphan-of-a-reward")) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert_gone("orphan-of-a-reward")


def test_no_descriptors_are_lost(sandbox: Bubblewrap) -> None:  # noqa: F811
    run(sandbox, "pass")
    before = psutil.Process().num_fds()
    for code in ("pass", "import os; os._exit(1)", "while True: print('x' * 10**6)"):
        run(sandbox, code)
    assert psutil.Process().num_fds() == before


def test_a_missing_tool_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.shutil, "which", lambda name, path=None: None)
    with pytest.raises(Unavailable, match="bwrap is not installed: apt-get install -y bubblewrap"):
        Bubblewrap(LIMITS, 1).start()


def test_a_sandbox_that_cannot_start_is_unavailable_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where user namespaces are forbidden: bubblewrap ends with a message before any code runs."""
    need_bubblewrap()
    view = layout._view
    monkeypatch.setattr(layout, "_view", lambda *args: [*view(*args), "--ro-bind", "/no/such/folder", "/x"])
    broken = Bubblewrap(LIMITS, 1)
    with pytest.raises(Unavailable, match=r"(?s)does not work here.*/no/such/folder.*user\.max_user_namespaces"):
        broken.start()


@pytest.mark.parametrize(
    ("removed", "leak"),
    [
        (["--unshare-net"], "there is a network"),
        (["--unshare-pid"], "other processes can be seen"),
    ],
)
def test_the_self_test_finds_what_does_not_isolate(
    monkeypatch: pytest.MonkeyPatch, removed: list[str], leak: str
) -> None:
    need_bubblewrap()
    view = layout._view
    monkeypatch.setattr(layout, "_view", lambda *args: [word for word in view(*args) if word not in removed])
    leaky = Bubblewrap(LIMITS, 1)
    with pytest.raises(Unavailable, match=f"does not isolate.*{leak}"):
        leaky.start()


def test_the_callers_deadline_is_not_the_codes_fault(sandbox: Bubblewrap) -> None:  # noqa: F811
    with pytest.raises(TimeoutError):
        sandbox.run_program("while True: pass", "", time.monotonic() + 1.0)
    with pytest.raises(TimeoutError):
        sandbox.run_program("pass", "", time.monotonic() - 1.0)


def test_a_sandbox_killed_from_outside_is_unavailable(sandbox: Bubblewrap) -> None:  # noqa: F811
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(run, sandbox, "import time; time.sleep(500)")
        end = time.monotonic() + 20
        bwrap: list[psutil.Process] = []
        while not bwrap and time.monotonic() < end:
            time.sleep(0.5)
            bwrap = [child for child in psutil.Process().children() if child.name() == "bwrap"]
        bwrap[0].kill()
        with pytest.raises(Unavailable, match=r"killed from outside|did not start"):
            future.result()
