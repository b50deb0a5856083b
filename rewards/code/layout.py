"""The command line of a sandbox: what it sees, who it is there, and what it may take."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rewards.code.isolation import Limits, Unavailable
from rewards.code.user_namespace import INNER_ID

INSIDE = "/inside"
"""Where a sandbox finds the programs of `rewards.code.inside`."""
_TOOLS = {"bwrap": "bubblewrap", "prlimit": "util-linux", "setpriv": "util-linux"}
_OLDEST = (0, 8)
"""bubblewrap before it cannot forbid further user namespaces."""
_LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64")
_OPEN_FILES = 128
_ENVIRONMENT = {"HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def is_root() -> bool:
    """Root's sandboxes need a user namespace made in advance (see `user_namespace`)."""
    return os.geteuid() == 0


class Layout:
    """Finds the tools and the interpreter, puts the inner programs into `folder`, and writes command lines."""

    def __init__(self, limits: Limits, python: str | None, folder: Path) -> None:
        """Raises Unavailable if something is missing, with the command that installs it."""
        self._tools = {name: _tool(name) for name in _TOOLS if name != "setpriv" or is_root()}
        _refuse_old_bubblewrap(self._tools["bwrap"])
        # Not the environment that rlkit is installed in: there is much to read in it, and it starts slower.
        self._python = python or os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        # Without `site` Python starts up to four times faster, and no hook of an installed package runs in the sandbox.
        self._options = ["-I", "-B", "-X", "utf8"] if python else ["-I", "-S", "-B", "-X", "utf8"]
        folders = _folders_of_python(self._python)
        _write_programs(folder, self._python)
        self._view = _view(folders, self._tools, folder, limits)
        self._limits = [
            self._tools["prlimit"],
            f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
            f"--as={limits.memory_mib * 2**20}",
            f"--fsize={limits.file_mib * 2**20}",
            # bubblewrap's own process counts where it is the same user.
            f"--nproc={limits.processes + (0 if is_root() else 1)}",
            f"--nofile={_OPEN_FILES}",
            "--core=0",
            "--",
        ]

    def arguments(self, namespace: int | None) -> list[str]:
        """The command line up to the Python program text. `namespace`: the user namespace of root's sandbox."""
        bwrap = self._tools["bwrap"]
        if namespace is None:
            users = ["--unshare-user", "--disable-userns", "--uid", str(INNER_ID), "--gid", str(INNER_ID)]
            change_user = []
        else:
            users = ["--userns", str(namespace), "--cap-drop", "ALL"]
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # given up again by setpriv
                users += ["--cap-add", capability]
            change_user = [self._tools["setpriv"], f"--reuid={INNER_ID}", f"--regid={INNER_ID}", "--clear-groups"]
            change_user += ["--bounding-set=-all", "--inh-caps=-all"]
        python = [self._python, *self._options, "-c"]
        return [bwrap, *users, *self._view, "--", *change_user, *self._limits, *python]


def _view(python: Sequence[str], tools: dict[str, str], programs: Path, limits: Limits) -> list[str]:
    """bubblewrap's options for namespaces, file system and environment."""
    shown = [*python, *(tool for name, tool in tools.items() if name != "bwrap")]
    shown += [library for library in _LIBRARIES if Path(library).is_dir()]
    shown = [path for path in shown if not any(path != other and Path(other) in Path(path).parents for other in shown)]
    view = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    view += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--clearenv"]
    for name, value in _ENVIRONMENT.items():
        view += ["--setenv", name, value]
    parents = {str(parent): None for path in (*shown, INSIDE + "/x") for parent in reversed(Path(path).parents)}
    for parent in parents:
        if parent != "/":  # bubblewrap would make them for root alone
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
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/bin:/bin:/usr/sbin")
    if found is None:
        package = _TOOLS[name]
        raise Unavailable(f"{name} is not installed: apt-get install -y {package} (or dnf install {package})")
    return os.path.realpath(found)


def _refuse_old_bubblewrap(bwrap: str) -> None:
    answer = subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    version = re.search(r"(\d+)\.(\d+)", answer)
    if version is None or (int(version[1]), int(version[2])) < _OLDEST:
        raise Unavailable(f"bubblewrap {'.'.join(map(str, _OLDEST))} or newer is needed, {bwrap} is {answer.strip()!r}")


def _folders_of_python(python: str) -> list[str]:
    """What the interpreter needs to see: its own folder and that of the one it is an environment of."""
    script = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, sys.version_info[:2] >= (3, 10)]))"
    try:
        done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=True)
        *folders, new_enough = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise Unavailable(f"reward.python={python} does not run: {error}") from error
    if not new_enough:
        raise Unavailable(f"reward.python={python} is older than Python 3.10")
    if not Path(python).is_absolute():
        raise Unavailable(f"reward.python={python} must be an absolute path")
    return list(dict.fromkeys(folders))


def _write_programs(folder: Path, python: str) -> None:
    """Copies of `rewards.code.inside`, compiled, that every user may read, and nothing else of this package."""
    target = folder
    folder.chmod(0o755)
    for name in ("rewards", "code", "inside"):
        target = target / name
        target.mkdir()
        (target / "__init__.py").touch()
    for source in (Path(__file__).parent / "inside").glob("*.py"):
        (target / source.name).write_text(source.read_text())
    compiled = [python, "-I", "-S", "-m", "compileall", "-q", str(folder)]
    done = subprocess.run(compiled, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise Unavailable(f"reward.python={python} cannot compile the inner programs: {done.stdout}{done.stderr}")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
