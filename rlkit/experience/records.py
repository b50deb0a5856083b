"""Records as JSON, exact to the last bit and without pickle: arrays as dtype, shape and base64, records by class
name."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlkit.experience import types

RECORDS: dict[str, Any] = {name: kind for name, kind in vars(types).items() if dataclasses.is_dataclass(kind)}
RECORD, ARRAY, TUPLE = "__record__", "__array__", "__tuple__"


def to_json(value: Any) -> Any:
    """Return what `json.dumps` accepts. Raises TypeError for anything that `from_json` could not restore."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        raw = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
        return {ARRAY: value.dtype.str, "shape": list(value.shape), "data": raw}
    if isinstance(value, tuple):
        return {TUPLE: [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str) or key in (RECORD, ARRAY, TUPLE)]
        if strange:
            raise TypeError(f"a mapping with the key {strange[0]!r} cannot be saved in a checkpoint")
        return {key: to_json(item) for key, item in value.items()}
    if type(value).__name__ in RECORDS and isinstance(value, RECORDS[type(value).__name__]):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {RECORD: type(value).__name__, **fields}
    raise TypeError(f"{type(value).__name__} cannot be saved in a checkpoint: {value!r:.80}")


def from_json(value: Any) -> Any:
    """Restore what `to_json` wrote. Raises KeyError or TypeError for records that it did not write."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if ARRAY in value:
        raw = np.frombuffer(base64.b64decode(value["data"]), dtype=np.dtype(value[ARRAY]))
        return raw.reshape(value["shape"]).copy()
    if TUPLE in value:
        return tuple(from_json(item) for item in value[TUPLE])
    plain = {key: from_json(item) for key, item in value.items() if key != RECORD}
    return RECORDS[value[RECORD]](**plain) if RECORD in value else plain
