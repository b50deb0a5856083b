"""The process that runs the model's code. Everything it sends is untrusted and treated only as data."""

from __future__ import annotations

import sys

from rewards.services.sandbox.inside.wire import ConversationEnded, decode, encode, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO


def load(code: str, setup: str) -> dict[str, Any]:
    """Run setup and code as a new module and return its globals; raise whatever they raise.

    Code that does not compile alone may complete the setup, as the body of a function whose head was the question.
    """
    module = type(sys)("solution")
    sys.modules["solution"] = module
    namespace = module.__dict__
    try:
        program = compile(code, "solution.py", "exec", dont_inherit=True)
    except SyntaxError:
        try:
            program, setup = compile(setup + code, "solution.py", "exec", dont_inherit=True), ""
        except SyntaxError:
            program = compile(code, "solution.py", "exec", dont_inherit=True)  # its own error is the informative one
    if setup:
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), namespace)
    exec(program, namespace)
    return namespace


def find_function(namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    """Return the function, or the method of a new `Solution`; raise NameError if there is neither."""
    if name in namespace:
        return namespace[name]  # type: ignore[no-any-return]
    if "Solution" in namespace:
        return getattr(namespace["Solution"](), name)  # type: ignore[no-any-return]
    raise NameError(f"the code defines no function {name!r}")


def describe(error: BaseException) -> list[str]:
    """Return an exception's name and text; its `__str__` may fail."""
    try:
        text = str(error)[:500]
    except BaseException as failure:
        text = f"its text cannot be shown: {type(failure).__name__}"
    return [type(error).__name__, text]


def answer_calls(job: dict[str, Any], results: BinaryIO) -> None:
    """Call `fn_name` with each list of arguments; send `["value", ...]` or `["raise", name, text]` per call."""
    try:
        namespace = load(job["code"], job["setup"])
    except BaseException as error:
        send(results, ["load", *describe(error)])
        return
    for arguments in job["calls"]:
        try:
            value = find_function(namespace, job["fn_name"])(*arguments)
            message = ["value", encode(value, id)]
        except BaseException as error:
            message = ["raise", *describe(error)]
        send(results, message)


class Server:
    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests, self._replies = requests, replies
        self._objects: list[Any] = []
        self._namespace: dict[str, Any] = {}

    def serve(self, job: dict[str, Any]) -> None:
        try:
            send(self._replies, ["value", None])
            self._namespace = load(job["code"], job["setup"])
            send(self._replies, ["value", None])
        except ConversationEnded:
            return
        except BaseException as error:
            send(self._replies, ["raise", *describe(error)])
            return
        while True:
            try:
                request = receive(self._requests)
            except ConversationEnded:
                return
            try:
                reply = ["value", encode(self._answer(*request), self._handle)]
            except StopIteration as error:
                reply = ["end" if request[0] == "next" else "raise", *describe(error)]
            except BaseException as error:  # the tester decides what an exception means
                reply = ["raise", *describe(error)]
            try:
                send(self._replies, reply)
            except ConversationEnded:
                return

    def _answer(self, operation: str, target: Any, *details: Any) -> Any:
        if operation == "defines":
            return target in self._namespace
        if operation == "name":
            return self._namespace[target]
        subject = self._objects[target]
        if operation == "call" or operation == "call in place":
            arguments = [decode(item, self._objects.__getitem__) for item in details[0]]
            named = {name: decode(item, self._objects.__getitem__) for name, item in details[1]}
            value = subject(*arguments, **named)
            return value if operation == "call" else (value, arguments)
        if operation == "attribute":
            return getattr(subject, details[0])
        if operation == "item":
            return subject[decode(details[0], self._objects.__getitem__)]
        plain: dict[str, Callable[[Any], Any]] = {"iter": iter, "next": next, "len": len}
        return plain[operation](subject)

    def _handle(self, value: Any) -> int:
        for number, known in enumerate(self._objects):
            if known is value:
                return number
        self._objects.append(value)
        return len(self._objects) - 1
