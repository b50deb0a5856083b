"""A user namespace in which root's sandboxes run as somebody else.

The kernel does not limit the number of processes of the machine's root, whatever it is called in a namespace that
bubblewrap makes. Here the sandbox's user is `nobody` outside, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from rewards.code.isolation import Unavailable

INNER_ID = 1000
"""User and group of the model's code inside."""
_NOBODY = 65534
_TIMEOUT_SECONDS = 20.0

# Python 3.11 has no os.unshare. 0 as limit: nobody inside makes further user namespaces, where he would be root.
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
    """A file descriptor of a new user namespace; it lives as long as that is open. Raises Unavailable."""
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
            # Root is needed to build the sandbox, nobody to run in it.
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
