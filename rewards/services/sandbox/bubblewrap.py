"""Sandboxes on this machine, made by bubblewrap."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rewards.services.sandbox.inside.start import READY
from rewards.services.sandbox.inside.wire import messages
from rewards.services.sandbox.isolation import Isolation, Job, Limits, Run, Unavailable
from rewards.services.sandbox.process import Command, Supervised, supervise
from rewards.services.scratch import ScratchFolder

INNER_ID = 1000
_NOBODY = 65534
_TIMEOUT_SECONDS = 20.0

# Python 3.11 has no os.unshare. The limit 0 prevents code inside from making user namespaces, where it would be root.
_CHILD = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
    sys.exit(os.strerror(ctypes.get_errno()))
print("made", flush=True)
sys.stdin.readline()
with open("/proc/sys/user/max_user_namespaces", "w") as file:
    file.write("0")
print("closed", flush=True)
sys.stdin.readline()
"""


def make_user_namespace() -> int:
    """Return a file descriptor that keeps a new user namespace alive while open; raise Unavailable.

    The kernel does not limit the processes of the machine's root, whatever it is called in a namespace. With this
    namespace, the sandbox's user is `nobody` outside it, too.
    """
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        timer = threading.Timer(_TIMEOUT_SECONDS, child.kill)
        timer.start()
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        try:
            if child.stdout.readline() != "made\n":
                raise Unavailable(f"no user namespace can be made: {child.stderr.read().strip()}")
            # Building the sandbox needs root; the code in it runs as nobody.
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{child.pid}/{name}").write_text(f"0 0 1\n{INNER_ID} {_NOBODY} 1\n")
            child.stdin.write("\n")
            child.stdin.flush()
            if child.stdout.readline() != "closed\n":
                raise Unavailable(f"a user namespace cannot be closed: {child.stderr.read().strip()}")
            descriptor = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY)
            child.communicate("\n", timeout=_TIMEOUT_SECONDS)
        except OSError as error:
            raise Unavailable(f"no user namespace can be made: {error}") from error
        finally:
            timer.cancel()
            child.kill()
    return descriptor


INSIDE = "/inside"
_TOOLS = {"bwrap": "bubblewrap", "prlimit": "util-linux", "setpriv": "util-linux"}
_OLDEST = (0, 8)
"""Older versions of bubblewrap cannot forbid further user namespaces."""
_LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64")
_OPEN_FILES = 128
_ENVIRONMENT = {"HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def is_root() -> bool:
    return os.geteuid() == 0


class Layout:
    """Finds the tools and the interpreter, writes the inner programs to `folder`, builds command lines."""

    def __init__(self, limits: Limits, python: str | None, folder: Path) -> None:
        """Raise Unavailable."""
        self._tools = {name: _tool(name) for name in _TOOLS if name != "setpriv" or is_root()}
        _refuse_old_bubblewrap(self._tools["bwrap"])
        # Not rlkit's own environment: code could read a lot there, and its Python starts more slowly.
        self._python = python or os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        # Without `site`, Python starts up to four times faster, and no installed package's hook runs in the sandbox.
        self._options = ["-I", "-B", "-X", "utf8"] if python else ["-I", "-S", "-B", "-X", "utf8"]
        folders = _folders_of_python(self._python)
        _write_programs(folder, self._python)
        self._view = _view(folders, self._tools, folder, limits)
        self._limits = [
            self._tools["prlimit"],
            f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
            f"--as={limits.memory_mib * 2**20}",
            f"--fsize={limits.file_mib * 2**20}",
            # bubblewrap's own process counts if it runs as the same user.
            f"--nproc={limits.processes + (0 if is_root() else 1)}",
            f"--nofile={_OPEN_FILES}",
            "--core=0",
            "--",
        ]

    def arguments(self, namespace: int | None) -> list[str]:
        """Return the command line up to the Python code. `namespace`: the user namespace if root runs the sandbox."""
        bwrap = self._tools["bwrap"]
        if namespace is None:
            users = ["--unshare-user", "--disable-userns", "--uid", str(INNER_ID), "--gid", str(INNER_ID)]
            change_user = []
        else:
            users = ["--userns", str(namespace), "--cap-drop", "ALL"]
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # setpriv drops them again
                users += ["--cap-add", capability]
            change_user = [self._tools["setpriv"], f"--reuid={INNER_ID}", f"--regid={INNER_ID}", "--clear-groups"]
            change_user += ["--bounding-set=-all", "--inh-caps=-all"]
        python = [self._python, *self._options, "-c"]
        return [bwrap, *users, *self._view, "--", *change_user, *self._limits, *python]


def _view(python: Sequence[str], tools: dict[str, str], programs: Path, limits: Limits) -> list[str]:
    shown = [*python, *(tool for name, tool in tools.items() if name != "bwrap")]
    shown += [library for library in _LIBRARIES if Path(library).is_dir()]
    shown = [path for path in shown if not any(path != other and Path(other) in Path(path).parents for other in shown)]
    view = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    view += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--clearenv"]
    for name, value in _ENVIRONMENT.items():
        view += ["--setenv", name, value]
    parents = {str(parent): None for path in (*shown, INSIDE + "/x") for parent in reversed(Path(path).parents)}
    for parent in parents:
        if parent != "/":  # bubblewrap would make them accessible to root only
            view += ["--perms", "0755", "--dir", parent]
    for path in dict.fromkeys(shown):
        view += ["--ro-bind", path, path]
    for folder in (Path("/lib"), Path("/lib32"), Path("/lib64")):
        if folder.is_symlink():
            view += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():
            view += ["--ro-bind", str(folder), str(folder)]
    for path in ("/etc/ld.so.cache", "/etc/alternatives"):
        view += ["--ro-bind-try", path, path]
    view += ["--ro-bind", str(programs), INSIDE, "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    view += ["--perms", "1777", "--size", str(limits.file_mib * 2**20), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*view, "--remount-ro", "/"]


def _tool(name: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/bin:/bin:/usr/sbin")
    if path is None:
        package = _TOOLS[name]
        raise Unavailable(f"{name} is not installed: apt-get install -y {package} (or dnf install {package})")
    return os.path.realpath(path)


def _refuse_old_bubblewrap(bwrap: str) -> None:
    answer = subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    version = re.search(r"(\d+)\.(\d+)", answer)
    if version is None or (int(version[1]), int(version[2])) < _OLDEST:
        raise Unavailable(f"bubblewrap {'.'.join(map(str, _OLDEST))} or newer is needed, {bwrap} is {answer.strip()!r}")


def _folders_of_python(python: str) -> list[str]:
    script = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, sys.version_info[:2] >= (3, 10)]))"
    try:
        done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=True)
        *folders, new_enough = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise Unavailable(f"python={python} does not run: {error}") from error
    if not new_enough:
        raise Unavailable(f"python={python} is older than Python 3.10")
    if not Path(python).is_absolute():
        raise Unavailable(f"python={python} must be an absolute path")
    return list(dict.fromkeys(folders))


def _write_programs(folder: Path, python: str) -> None:
    target = folder
    folder.chmod(0o755)
    for name in ("rewards", "services", "sandbox", "inside"):
        target = target / name
        target.mkdir()
        (target / "__init__.py").touch()
    for source in (Path(__file__).parent / "inside").glob("*.py"):
        (target / source.name).write_text(source.read_text())
    compiled = [python, "-I", "-S", "-m", "compileall", "-q", str(folder)]
    done = subprocess.run(compiled, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise Unavailable(f"python={python} cannot compile the inner programs: {done.stdout}{done.stderr}")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


# Tries everything that a sandbox must not allow, and prints what succeeded.
SELF_TEST = r"""
import ctypes, json, os, socket, sys, time
job = json.load(sys.stdin)
leaks = []
if os.getuid() == 0:
    leaks.append("the code is root")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
if int(status["CapEff"], 16) or int(status["CapPrm"], 16):
    leaks.append("the code has capabilities")
if int(status["NoNewPrivs"]) != 1:
    leaks.append("the code may gain privileges")
unexpected = set(os.environ) - {"HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PWD", "LC_CTYPE"}
if unexpected:
    leaks.append("the environment holds " + ", ".join(sorted(unexpected)))
if len([name for name in os.listdir("/proc") if name.isdigit()]) > 2:
    leaks.append("other processes can be seen")
for name in os.listdir("/sys/class/net") if os.path.isdir("/sys/class/net") else []:
    leaks.append("network interfaces can be seen")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
        probe.connect(("192.0.2.1", 9))  # sends nothing; without a network there is no route
        leaks.append("there is a network")
    except OSError:
        pass
for folder in ("/", "/dev", "/dev/shm", "/inside", "/usr", os.path.dirname(sys.executable)):
    try:
        with open(os.path.join(folder, "probe"), "w"):
            leaks.append("files can be written in " + folder)
    except OSError:
        pass
if ctypes.CDLL(None).unshare(0x10000000) == 0:
    leaks.append("user namespaces can be made")
children = 0
while children <= job["processes"]:
    try:
        child = os.fork()
    except OSError:
        break
    if child == 0:
        time.sleep(600)  # killed with the sandbox
    children += 1
else:
    leaks.append("the number of processes is not limited")
print(json.dumps(leaks))
"""

STARTUP_SECONDS = 30.0  # for a sandbox to be ready
_SHOWN_CHARACTERS = 2000
_RESULTS_PER_OUTPUT = 4
"""Results are written with their types, so they may be longer than the output."""
_OUT_OF_CPU_TIME = 128 + signal.SIGXCPU
_REMEDY = (
    "Sandboxes need user namespaces: sysctl -w user.max_user_namespaces=10000 (Debian: kernel.unprivileged_userns_clone"
    "=1; Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt seccomp=unconfined "
    "--security-opt systempaths=unconfined). Or run a SandboxFusion service and set isolation=http."
)


class Bubblewrap(Isolation):
    """No network, a read-only file system with little more than Python, an empty environment, separate namespaces."""

    def __init__(self, limits: Limits, side_by_side: int, python: str | None = None) -> None:
        self._limits, self._side_by_side, self._python = limits, side_by_side, python
        self._slots: queue.Queue[int | None] = queue.Queue()
        self._namespaces: list[int] = []
        self._programs: ScratchFolder | None = None

    def start(self) -> None:
        """Start, and run a self-test that tries to escape."""
        self._programs = ScratchFolder("rlkit-sandbox-")
        try:
            self._layout = Layout(self._limits, self._python, self._programs.path)
            for _ in range(self._side_by_side):
                if is_root():
                    self._namespaces.append(make_user_namespace())
                self._slots.put(self._namespaces[-1] if is_root() else None)
            self._self_test()
        except Unavailable:
            self.close()
            raise

    def close(self) -> None:
        while self._namespaces:
            os.close(self._namespaces.pop())
        if self._programs is not None:
            self._programs.remove()
            self._programs = None

    def run_program(self, code: str, stdin: str, deadline: float) -> Run:
        with _file(stdin.encode()) as standard_input, _file(code.encode()) as source, self._slot(deadline) as slot:
            command = self._command(slot, "program", standard_input, (source,))
            return self._run([command], deadline)

    def run_calls(self, job: Job, deadline: float) -> Run:
        with _file(json.dumps(job).encode()) as standard_input, self._slot(deadline) as slot:
            return self._run([self._command(slot, "calls", standard_input)], deadline)

    def run_tests(self, solution: Job, tests: Job, deadline: float) -> Run:
        with (
            _file(json.dumps(solution).encode()) as solution_job,
            _file(json.dumps(tests).encode()) as tests_job,
            self._slot(deadline) as slot,
        ):
            requests_out, requests_in = os.pipe()
            replies_out, replies_in = os.pipe()
            tester = self._command(slot, "tester", tests_job, (requests_in, replies_out))
            code = self._command(slot, "solution", solution_job, (requests_out, replies_in))
            return self._run([tester, code], deadline, (requests_out, requests_in, replies_out, replies_in))

    @contextmanager
    def _slot(self, deadline: float) -> Iterator[int | None]:
        try:
            slot = self._slots.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("the time for this call ended before a sandbox was free") from None
        try:
            yield slot
        finally:
            self._slots.put(slot)

    def _command(self, slot: int | None, role: str, stdin: int, descriptors: tuple[int, ...] = ()) -> Command:
        def arguments(results: int) -> list[str]:
            numbers = "".join(f", {number}" for number in (results, *descriptors))
            call = f"from rewards.services.sandbox.inside.start import start; start({role!r}{numbers})"
            return [*self._layout.arguments(slot), f"import sys; sys.path.insert(0, {INSIDE!r}); {call}"]

        return Command(arguments, stdin, descriptors if slot is None else (*descriptors, slot))

    def _run(self, commands: list[Command], deadline: float, pipes: tuple[int, ...] = ()) -> Run:
        try:
            done = supervise(
                commands,
                READY,
                self._limits.wall_seconds,
                STARTUP_SECONDS,
                deadline,
                max_output=self._limits.output_kib * 1024,
                max_results=_RESULTS_PER_OUTPUT * self._limits.output_kib * 1024,
                handed_over=pipes,
            )
        except OSError as error:
            raise Unavailable(f"a sandbox cannot be started: {error}") from error
        return _outcome(done)

    def _self_test(self) -> None:
        job = json.dumps({"processes": self._limits.processes})
        try:
            run = self.run_program(SELF_TEST, job, time.monotonic() + 2 * STARTUP_SECONDS)
        except Unavailable as error:
            raise Unavailable(f"bubblewrap does not work here: {error}\n{_REMEDY}") from error
        leaks = next(messages(run.stdout), None)
        if leaks != []:
            problem = "; ".join(leaks) if leaks else f"the self-test failed: {run.stderr.strip()[-500:]}"
            raise Unavailable(f"the sandbox does not isolate: {problem}")


def _outcome(done: Supervised) -> Run:
    """Return the result. Raise Unavailable if the code never ran, TimeoutError if the caller's deadline came first."""
    if done.ended == "deadline":
        raise TimeoutError("the time for this call ended before the code's own")
    for child in done.children:
        if not child.written["results"].startswith(READY):
            cause = _text(child.written["stderr"]).strip() or f"exit code {child.exit_code} without a message"
            when = f" within {STARTUP_SECONDS:g} s" if done.ended == "startup" else ""
            raise Unavailable(f"a sandbox did not start{when}: {cause}")
    first, code = done.children[0], done.children[-1]
    ended: Literal["exit", "timeout", "output"] = "timeout" if done.ended == "startup" else done.ended
    if code.overflow:
        ended = "output"
    elif _OUT_OF_CPU_TIME in (first.exit_code, code.exit_code):  # the code's return value may make a test loop
        ended = "timeout"
    if done.ended == "exit" and (first.exit_code or 0) < 0:
        raise Unavailable(f"a sandbox was killed from outside (signal {-(first.exit_code or 0)})")
    exit_code = None if (code.exit_code or 0) < 0 else code.exit_code
    results = tuple(messages(bytes(first.written["results"])))[1:]
    return Run(ended, exit_code, bytes(first.written["stdout"]), _text(code.written["stderr"]), results)


def _text(data: bytearray) -> str:
    return bytes(data).decode(errors="replace")[-_SHOWN_CHARACTERS:]


@contextmanager
def _file(content: bytes) -> Iterator[int]:
    with open(os.memfd_create("job"), "w+b") as file:  # noqa: PTH123
        file.write(content)
        file.seek(0)
        yield file.fileno()
