"""`python -m rlkit.view RUN [RUN ...]`: look at runs in a browser, while they train or afterwards.

python -m rlkit.view runs/today
python -m rlkit.view runs                      # all runs in the folder, including new ones
python -m rlkit.view --text runs/today         # in the terminal
python -m rlkit.view runs --host 0.0.0.0       # for other machines: the printed link contains a token
"""

from __future__ import annotations

import argparse
import getpass
import os
import secrets
import socket
import sys
from collections.abc import Sequence

from rlkit.config.access import is_loopback, token_problem
from rlkit.config.command import exit_code
from rlkit.experience import UserError

PORT = 7007
TRIES = 50
"""Ports to try, from `--port` on; the first free one is used."""
TOKEN = "RLKIT_VIEW_TOKEN"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; return 0, or 1 for folders without a run or if no port is free."""
    return exit_code(_view, arguments)


def _view(arguments: list[str]) -> int:
    given = parser().parse_args([word.removeprefix("run=") for word in arguments])
    from rlkit.view.runs import Runs

    runs = Runs(given.runs)
    if given.text:
        from rlkit.view.text import show

        show(runs)
        return 0
    token = _token(given.host, given.token)
    from rlkit.view.http import listening, serve

    with listening(given.host, given.port, TRIES if given.port else 1) as listener:
        port = listener.getsockname()[1]
        for line in _where(given.host, port, token):
            print(line, flush=True)
        serve(runs, given.host, token, listener)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlkit view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder of run folders")
    parser.add_argument("--text", action="store_true", help="print the state of the runs and exit")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: only this machine)")
    parser.add_argument("--port", type=int, default=PORT, help=f"the first free port from here on is used ({PORT})")
    parser.add_argument(
        "--token",
        action="store_true",
        help=f"require a token on 127.0.0.1, too, if others have accounts on this machine; {TOKEN} sets your own",
    )
    return parser


def _token(host: str, asked: bool) -> str | None:
    """Return the token; None if only this machine, whose users are trusted, can reach the server."""
    own = os.environ.get(TOKEN, "").strip()
    if own and (problem := token_problem(own)):
        raise UserError(f"{TOKEN}: {problem}")
    if not asked and not own and is_loopback(host):
        return None
    return own or secrets.token_urlsafe()


def _where(host: str, port: int, token: str | None) -> list[str]:
    """Return lines with the link and how to reach it from elsewhere."""
    query = "" if token is None else f"?token={token}"
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    link = f"http://[{name}]:{port}/{query}" if ":" in name else f"http://{name}:{port}/{query}"
    lines = [f"open in a browser: {link}"]
    if is_loopback(host) and "SSH_CONNECTION" in os.environ:
        there = f"{getpass.getuser()}@{socket.gethostname()}"
        lines.append(f"first, on your own machine: ssh -L {port}:127.0.0.1:{port} {there}")
    return [*lines, "Ctrl-C ends it"]


if __name__ == "__main__":
    sys.exit(main())
