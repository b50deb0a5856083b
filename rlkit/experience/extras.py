"""Messages about missing packages that rlkit's core does not install."""

from importlib.util import find_spec

from rlkit.experience.errors import UserError

TRAINING = ("torch", "transformers", "deepspeed", "ray", "vllm")
"""Packages that the extras `cpu` and `cuda` install, by import name."""
_BROUGHT_ALONG = ("accelerate", "aiohttp", "requests", "safetensors")


class NotInstalledError(UserError): ...


def lacking(package: str, extra: str = "") -> list[str]:
    """Return a message if `package` is not installed. `extra`: the rlkit extra that installs it, if named otherwise."""
    if find_spec(package) is not None:
        return []
    return [f"the package {package} is not installed: pip install 'rlkit[{extra or package}]'"]


def lacking_for_training(*packages: str) -> list[str]:
    """Return a message that names those of `packages` that are not installed, if there are any."""
    missing = [package for package in packages if find_spec(package) is None]
    if not missing:
        return []
    verb = "is" if len(missing) == 1 else "are"
    return [
        f"{', '.join(missing)} {verb} not installed; training, and anything that runs a model, needs rlkit[cpu] or "
        "rlkit[cuda]: rlkit doctor prints the command that installs it on this machine"
    ]


def refuse_without(*packages: str) -> None:
    """Raise NotInstalledError if any of `packages` is not installed."""
    for message in lacking_for_training(*packages):
        raise NotInstalledError(message)


def named_extra(error: Exception) -> str | None:
    """Return the message for a failed import if `cpu` and `cuda` install the package, else None."""
    package = ((error.name if isinstance(error, ModuleNotFoundError) else None) or "").partition(".")[0]
    return next(iter(lacking_for_training(package) if package in (*TRAINING, *_BROUGHT_ALONG) else []), None)
