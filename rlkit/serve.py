"""`python -m rlkit.serve reward=... [serve.key=value ...]`: serve any reward over HTTP, for runs with `reward=remote`.

python -m rlkit.serve reward=rule
python -m rlkit.serve reward=function reward.function=my_module.my_function serve.port=8001
RLKIT_TOKEN=... python -m rlkit.serve reward=polar serve.host=0.0.0.0 serve.token_env=RLKIT_TOKEN
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rlkit.config.command import asks_for_help, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; returns 0, 1 if the reward cannot start, 2 for a wrong configuration."""
    return exit_code(_serve, arguments, has_dry_run=True)


def _serve(arguments: list[str]) -> int:
    from rlkit.serving.http.run import load_serve_config, print_help, serve

    if asks_for_help(arguments):
        print_help(__doc__)
        return 0
    resolved = load_serve_config(arguments)
    if resolved.dry_run:
        print("The configuration is valid; nothing was started (dry_run=true).")
    else:
        serve(resolved)
    return 0


if __name__ == "__main__":
    sys.exit(main())
