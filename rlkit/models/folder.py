"""The folder that a model path names.

`embedded:policy` and `embedded:polar` are the tiny models in the package (`examples/embedded_models/` makes them).
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED = Path(__file__).parents[1] / "embedded"
PREFIX = "embedded:"


def model_folder(path: str) -> Path:
    """The folder `path` names; `embedded:<name>` is one inside the package. Raises ValueError for an unknown name."""
    if not path.startswith(PREFIX):
        return Path(path).expanduser().absolute()  # actors may have another working folder
    folder = EMBEDDED / path.removeprefix(PREFIX)
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(f"{PREFIX}{config.parent.name}" for config in EMBEDDED.glob("*/config.json")))
        raise ValueError(f"there is no embedded model {path!r}; the package has: {known or 'none'}")
    return folder
