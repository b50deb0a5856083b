"""`python -m rlkit.serve reward=... [serve.key=value ...]`: serve any reward over HTTP, for `reward=remote` of a run.

python -m rlkit.serve reward=rule
python -m rlkit.serve reward=function reward.function=my_module.my_function serve.port=8001
RLKIT_TOKEN=... python -m rlkit.serve reward=polar serve.host=0.0.0.0 serve.token_env=RLKIT_TOKEN
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkit.config.messages import ConfigError, Problem

if TYPE_CHECKING:
    from rlkit.serving.http.config import ResolvedServe

CONFIG_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns 0, 1 if the reward cannot start, 2 for a wrong configuration."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        _print_help()
        return 0
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))  # a console script does not look for the user's modules here
    from rlkit.serving.http.config import load_serve_config

    try:
        resolved = load_serve_config(given)
        if resolved.dry_run:
            print("The configuration is valid; nothing was started (dry_run=true).")
            return 0
        with _listening(resolved) as listener:
            from rlkit.serving.http.app import serve

            return asyncio.run(serve(resolved, listener))
    except ConfigError as error:
        print(error.report(), file=sys.stderr)
        return CONFIG_ERROR


@contextlib.contextmanager
def _listening(resolved: ResolvedServe) -> Iterator[socket.socket]:
    """The port, taken before the reward is loaded; connections are accepted afterwards. Raises ConfigError."""
    serve = resolved.serve
    try:
        family, kind, _, _, address = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        where = f"serve.host={serve.host} serve.port={serve.port}"
        raise ConfigError([Problem(where, f"cannot listen there: {error.strerror}; choose another port")]) from error
    with listener:
        yield listener


def _print_help() -> None:
    from rich.console import Console

    from rlkit.config.help import print_section
    from rlkit.config.messages import all_fields
    from rlkit.serving.http.config import USED, ServeConfig

    print(__doc__)
    for key, text in USED.items():
        print(f"  {key:<10}{text}")
    print("  `python -m rlkit.train --help` lists all rewards with their keys.")
    print_section(Console(), "serve", ServeConfig.__doc__ or "", all_fields(ServeConfig, "serve."))


if __name__ == "__main__":
    sys.exit(main())
