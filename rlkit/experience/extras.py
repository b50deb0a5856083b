"""Packages that a part uses and rlkit does not bring."""

from importlib.util import find_spec


def lacking(package: str, extra: str = "") -> list[str]:
    """A message for the user if it is not installed. `extra`: rlkit's that brings it, if it has another name."""
    if find_spec(package) is not None:
        return []
    return [f"the package {package} is not installed: pip install 'rlkit[{extra or package}]'"]
