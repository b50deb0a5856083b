"""The folder that a model path names. `examples/embedded_models/` makes the `embedded:` ones."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = Path(__file__).parents[1] / "embedded"
PREFIX = "embedded:"


def model_folder(path: str) -> Path:
    """`embedded:<name>` is a tiny model inside the package. Raise ValueError for an unknown name."""
    if not path.startswith(PREFIX):
        return Path(path).expanduser().absolute()  # actors may have another working folder
    folder = EMBEDDED / path.removeprefix(PREFIX)
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(f"{PREFIX}{config.parent.name}" for config in EMBEDDED.glob("*/config.json")))
        raise ValueError(f"there is no embedded model {path!r}; the package has: {known or 'none'}")
    return folder
