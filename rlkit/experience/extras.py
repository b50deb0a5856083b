"""What to say where a package is not installed that rlkit's core does not bring."""

from importlib.util import find_spec

from rlkit.experience.errors import UserError

TRAINING = ("torch", "transformers", "deepspeed", "ray", "vllm")
"""What the extras `cpu` and `cuda` bring, by the names that are imported."""
_BROUGHT_ALONG = ("accelerate", "aiohttp", "requests", "safetensors")


class NotInstalledError(UserError): ...


def lacking(package: str, extra: str = "") -> list[str]:
    """A message for the user if it is not installed. `extra`: rlkit's that brings it, if it has another name."""
    if find_spec(package) is not None:
        return []
    return [f"the package {package} is not installed: pip install 'rlkit[{extra or package}]'"]


def lacking_for_training(*packages: str) -> list[str]:
    """A message that names all of `packages` that are not installed, if there are any."""
    missing = [package for package in packages if find_spec(package) is None]
    if not missing:
        return []
    verb = "is" if len(missing) == 1 else "are"
    return [
        f"{', '.join(missing)} {verb} not installed; training, and whatever runs a model, needs rlkit[cpu] or "
        "rlkit[cuda]: rlkit doctor prints the line that installs it on this machine"
    ]


def refuse_without(*packages: str) -> None:
    """Raises NotInstalledError."""
    for message in lacking_for_training(*packages):
        raise NotInstalledError(message)


def named_extra(error: Exception) -> str | None:
    """What to say about an import that failed, if `cpu` and `cuda` bring the package."""
    package = ((error.name if isinstance(error, ModuleNotFoundError) else None) or "").partition(".")[0]
    return next(iter(lacking_for_training(package) if package in (*TRAINING, *_BROUGHT_ALONG) else []), None)
