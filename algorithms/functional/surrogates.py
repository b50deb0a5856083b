"""Surrogate losses by name or dotted path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from algorithms.base import LossInputs
from algorithms.functional import losses

if TYPE_CHECKING:
    from torch import Tensor

Surrogate = Callable[..., "tuple[Tensor, Tensor]"]
"""Returns token losses [R] and where clipping binds [R]; parameters are fields of LossInputs and CLIP_OPTIONS."""
SURROGATES: Mapping[str, Surrogate] = {
    "clipped": losses.clipped_surrogate,
    "gspo": losses.gspo_surrogate,
    "cispo": losses.cispo_surrogate,
}
CLIP_OPTIONS = ("clip_low", "clip_high", "dual_clip")
INPUTS = (*(field.name for field in fields(LossInputs)), "num_sequences")


def find_surrogate(name: str) -> Any:
    """Raise ValueError for an unknown one."""
    if name in SURROGATES:
        return SURROGATES[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        guess = get_close_matches(name, SURROGATES, n=1)
        hint = f"did you mean {guess[0]}? " if guess else ""
        raise ValueError(f"{hint}must be one of {', '.join(SURROGATES)}, or the dotted path of a function or class")
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever a module of the user's raises while it is imported
        raise ValueError(f"cannot be imported: {type(error).__name__}: {error}") from error
    surrogate = getattr(module, attribute, None)
    if surrogate is None:
        guess = get_close_matches(attribute, [name for name, value in vars(module).items() if callable(value)], n=1)
        hint = f"; did you mean {module_name}.{guess[0]}?" if guess else ""
        raise ValueError(f"cannot be imported: {module.__file__} has no {attribute}{hint}")
    if not callable(surrogate):
        raise ValueError(f"is no function or class but {type(surrogate).__name__}")
    return surrogate


def surrogate_parameters(surrogate: Any) -> list[str]:
    """Raise ValueError for one that cannot be supplied."""
    if inspect.isclass(surrogate) and not any("__call__" in vars(base) for base in surrogate.__mro__):
        raise ValueError("is a class without __call__, which computes the loss")
    signature = inspect.signature(surrogate.__call__ if inspect.isclass(surrogate) else surrogate)
    parameters = [value for name, value in signature.parameters.items() if name != "self"]
    known = (*INPUTS, *CLIP_OPTIONS)
    for parameter in parameters:
        if parameter.name not in known and parameter.default is inspect.Parameter.empty:
            guess = get_close_matches(parameter.name, known, n=1)
            hint = f"; did you mean {guess[0]}?" if guess else f": {', '.join(known)}"
            raise ValueError(f"wants {parameter.name}, which is no field of LossInputs and no clip option{hint}")
    return [parameter.name for parameter in parameters if parameter.name in known]


def make_surrogate(name: str, options: Mapping[str, Any] | None) -> Surrogate:
    """Raise ValueError if the options do not fit."""
    surrogate = find_surrogate(name)
    is_class, config, options = inspect.isclass(surrogate), getattr(surrogate, "Config", None), options or {}
    instance: Surrogate
    if not is_class or config is None:
        if options:
            raise ValueError(f"{name} takes no options; only a class with a Config does")
        instance = surrogate() if is_class else surrogate
        return instance
    if not (inspect.isclass(config) and issubclass(config, BaseModel)):
        raise ValueError(f"the Config of {name} is no pydantic model")
    for option in options:
        if option not in config.model_fields:
            guess = get_close_matches(option, config.model_fields, n=1)
            hint = f"did you mean {guess[0]}? it has" if guess else "it has"
            raise ValueError(f"{option} is no option of {name}; {hint} {', '.join(config.model_fields) or 'none'}")
    try:
        instance = surrogate(config(**options))
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, details['loc']))}: {details['msg']}" for details in error.errors())
        raise ValueError("; ".join(wrong)) from error
    return instance
