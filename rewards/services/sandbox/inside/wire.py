"""Encodes values as JSON and decodes them: plain data by value, everything else as a numbered handle.

Decoding creates only builtin objects, so a solution cannot redefine `==` in a test.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, deque
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

MAX_MESSAGE_BYTES = 16 * 2**20
MAX_NUMBER_CHARACTERS = 2000
"""Longest Decimal or Fraction sent by value; longer ones stay handles."""
MOST_OF_ONE_HASH = 100
"""How many items of a set, or keys of a dictionary, may share a hash."""
_PLAIN = {
    "Decimal": re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,4})?|Infinity|NaN)"),
    "Fraction": re.compile(r"-?[0-9]+(?:/[0-9]+)?"),
}
"""The forms that `str` produces. Others are refused: Fraction("1e10000000") would take hours to compute."""


class ConversationEnded(Exception):
    """The other side closed the connection, died, or sent an invalid message."""


def encode(value: Any, handle: Callable[[Any], int]) -> Any:
    """Encode a value; `handle` gives a number to whatever is not plain data, or raises."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) < value < 2**63 else ["int", hex(value)]  # decimal digits are limited by Python
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return [type(value).__name__ if type(value) is bytearray else "bytes", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, dict):
        return ["dict", [[encode(key, handle), encode(item, handle)] for key, item in value.items()]]
    for name, kind in _COLLECTIONS.items():
        if isinstance(value, kind):
            return [name, [encode(item, handle) for item in value]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    special = _encode_special(value)
    if special is not None:
        return special
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), handle)
    return ["handle", handle(value)]


def _encode_special(value: Any) -> list[Any] | None:
    for module, name in (("decimal", "Decimal"), ("fractions", "Fraction")):
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
            try:
                return [name, _plain(name, str(value))]
            except ValueError:  # too long
                return None
    if "datetime" in sys.modules:
        dates = sys.modules["datetime"]
        if isinstance(value, dates.timedelta):
            return ["timedelta", [value.days, value.seconds, value.microseconds]]
        for name in ("datetime", "date", "time"):
            if isinstance(value, getattr(dates, name)):
                return [name, value.isoformat()]
    return None


_COLLECTIONS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


def decode(message: Any, handle: Callable[[int], Any]) -> Any:
    """Decode a message; raise ValueError, TypeError or similar for anything that `encode` never produces."""
    if message is None or isinstance(message, (bool, int, float, str)):
        return message
    if not isinstance(message, list):
        raise ValueError(f"unexpected {type(message).__name__}")
    name, *parts = message
    if name in _COLLECTIONS:
        items = [decode(item, handle) for item in parts[0]]
        return _COLLECTIONS[name](_check_hashes(items) if name in ("set", "frozenset") else items)
    if name == "dict":
        keys = _check_hashes([decode(key, handle) for key, _ in parts[0]])
        return dict(zip(keys, (decode(item, handle) for _, item in parts[0])))  # noqa: B905 (equally long)
    if name == "range":
        return range(*parts[0])
    if name == "timedelta":
        return import_module("datetime").timedelta(*parts[0])
    if name in ("datetime", "date", "time"):
        return getattr(import_module("datetime"), name).fromisoformat(parts[0])
    if name == "handle":
        return handle(int(parts[0]))
    return _SCALARS[name](*parts)


def _check_hashes(items: list[Any]) -> list[Any]:
    """Raise ValueError if many items share a hash (as multiples of 2**61 - 1 do): a set takes quadratic time then."""
    if len(items) > MOST_OF_ONE_HASH and max(Counter(map(hash, items)).values()) > MOST_OF_ONE_HASH:
        raise ValueError("too many items with the same hash")
    return items


_SCALARS: dict[str, Callable[..., Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": complex,
    "Decimal": lambda text: import_module("decimal").Decimal(_plain("Decimal", text)),
    "Fraction": lambda text: import_module("fractions").Fraction(_plain("Fraction", text)),
}


def _plain(name: str, text: str) -> str:
    """Check a Decimal's or Fraction's text; raise ValueError if the number is too large."""
    if len(text) > MAX_NUMBER_CHARACTERS or not _PLAIN[name].fullmatch(text):
        raise ValueError(f"no plain {name}")
    return text


def send(stream: BinaryIO, message: Any) -> None:
    try:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()
    except (OSError, ValueError) as error:
        raise ConversationEnded(str(error)) from error


def receive(stream: BinaryIO) -> Any:
    """Receive one message; raise ConversationEnded at the end of the stream and for an invalid message."""
    line = stream.readline(MAX_MESSAGE_BYTES + 1)
    if not line.endswith(b"\n"):
        raise ConversationEnded("the answer was too long" if line else "it ended")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConversationEnded("it sent no message") from error


def messages(data: bytes) -> Iterator[Any]:
    """Yield messages up to the first invalid one."""
    for line in data.split(b"\n"):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            return
