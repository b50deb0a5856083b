"""Surrogate losses by name or dotted path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from algorithms.base import LossInputs
from algorithms.functional import losses
from algorithms.functional.covariance import ClipCov, KLCov
from algorithms.functional.trust_regions import DPPO, SAPO, gmpo_surrogate
from rlkit.experience.names import find_object, nearest

if TYPE_CHECKING:
    from torch import Tensor

Surrogate = Callable[..., "tuple[Tensor, Tensor]"]
"""Returns token losses [R] and where clipping binds [R]; parameters are fields of LossInputs and CLIP_OPTIONS."""
SURROGATES: Mapping[str, Any] = {
    "clipped": losses.clipped_surrogate,
    "gspo": losses.gspo_surrogate,
    "cispo": losses.cispo_surrogate,
    "policy_gradient": losses.policy_gradient,
    "sapo": SAPO,
    "gmpo": gmpo_surrogate,
    "dppo": DPPO,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
}
"""Functions, or classes with a Config."""
CLIP_OPTIONS = ("clip_low", "clip_high", "dual_clip")
INPUTS = (*(field.name for field in fields(LossInputs)), "num_sequences")


def find_surrogate(name: str) -> Any:
    """Look up a surrogate. Raise ValueError (NotFoundError) if it is unknown."""
    if name in SURROGATES:
        return SURROGATES[name]
    if "." not in name:
        guess = nearest(name, SURROGATES)
        hint = f"did you mean {guess}? " if guess else ""
        raise ValueError(f"{hint}must be one of {', '.join(SURROGATES)}, or the dotted path of a function or class")
    surrogate = find_object(name)
    if not callable(surrogate):
        raise ValueError(f"is of type {type(surrogate).__name__}, not a function or class")
    return surrogate


def surrogate_parameters(surrogate: Any) -> list[str]:
    """Names of the inputs that a surrogate takes. Raise ValueError if one of them cannot be supplied."""
    if inspect.isclass(surrogate) and not any("__call__" in vars(base) for base in surrogate.__mro__):
        raise ValueError("is a class without __call__, which computes the loss")
    signature = inspect.signature(surrogate.__call__ if inspect.isclass(surrogate) else surrogate)
    parameters = [value for name, value in signature.parameters.items() if name != "self"]
    known = (*INPUTS, *CLIP_OPTIONS)
    for parameter in parameters:
        if parameter.name not in known and parameter.default is inspect.Parameter.empty:
            guess = nearest(parameter.name, known)
            hint = f"; did you mean {guess}?" if guess else f": {', '.join(known)}"
            raise ValueError(f"takes {parameter.name}, which is neither a field of LossInputs nor a clip option{hint}")
    return [parameter.name for parameter in parameters if parameter.name in known]


def make_surrogate(name: str, options: Mapping[str, Any] | None) -> Surrogate:
    """Create a surrogate. Raise ValueError if the options do not fit."""
    surrogate = find_surrogate(name)
    is_class, config, options = inspect.isclass(surrogate), getattr(surrogate, "Config", None), options or {}
    instance: Surrogate
    if not is_class or config is None:
        if options:
            raise ValueError(f"{name} takes no options; only a class with a Config does")
        instance = surrogate() if is_class else surrogate
        return instance
    if not (inspect.isclass(config) and issubclass(config, BaseModel)):
        raise ValueError(f"the Config of {name} is not a pydantic model")
    for option in options:
        if option not in config.model_fields:
            guess = nearest(option, config.model_fields)
            hint = f"did you mean {guess}? Its options:" if guess else "its options:"
            raise ValueError(f"{option} is not an option of {name}; {hint} {', '.join(config.model_fields) or 'none'}")
    try:
        instance = surrogate(config(**options))
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, details['loc']))}: {details['msg']}" for details in error.errors())
        raise ValueError("; ".join(wrong)) from error
    return instance
