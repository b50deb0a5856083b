"""The process that runs the tests; in it, the model's functions are proxies for another process."""

from __future__ import annotations

import ast
import builtins

from rewards.services.sandbox.inside.wire import ConversationEnded, decode, encode, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO


class SolutionError(Exception):
    """The solution's process is gone, or it raised something other than an ordinary builtin exception."""


class UnsupportedTest(Exception):
    """The test passes a value that cannot leave this process."""


class Conversation:
    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests, self._replies = requests, replies
        self._proxies: dict[int, Remote] = {}
        self.unsupported = ""
        """Why a test cannot run; kept in case the test swallowed the exception."""

    def ask(self, *request: Any) -> Any:
        """Send a request and return the reply; raise the solution's exception as a builtin one or as SolutionError."""
        try:
            send(self._requests, request)
            return self.answer(may_end=request[0] == "next")
        except ConversationEnded as error:
            raise SolutionError(f"the solution's process has ended: {error}") from None

    def answer(self, may_end: bool = False) -> Any:
        kind, *parts = receive(self._replies)
        if kind == "value":
            try:
                return decode(parts[0], self._proxy)
            except Exception as error:
                raise SolutionError(f"the solution's answer cannot be read: {type(error).__name__}") from None
        if kind == "end" and may_end:
            raise StopIteration
        name, text = (str(part) for part in parts)
        known = getattr(builtins, name, None)
        # A StopIteration from a function would end a loop of the test and make `all(map(f, xs))` true.
        if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, _NOT_RAISED):
            raise known(text)
        raise SolutionError(f"{name}: {text}")

    def encode(self, value: Any) -> Any:
        return encode(value, self._number)

    def _number(self, value: Any) -> int:
        if not isinstance(value, Remote):
            self.unsupported = f"it hands a {type(value).__name__} to the solution"
            raise UnsupportedTest(self.unsupported)
        return value._number

    def _proxy(self, number: int) -> Remote:
        if number not in self._proxies:
            self._proxies[number] = Remote(self, number)
        return self._proxies[number]


_NOT_RAISED = (StopIteration, StopAsyncIteration, UnicodeError)  # a UnicodeError cannot be built from a text


class Remote:
    """An object of the solution that is not plain data. It is equal only to itself, whatever its class says."""

    __slots__ = ("_conversation", "_number")

    def __init__(self, conversation: Conversation, number: int) -> None:
        self._conversation, self._number = conversation, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call("call", arguments, named)

    def _call(self, operation: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        encode_one = self._conversation.encode
        pairs = [[name, encode_one(value)] for name, value in named.items()]
        return self._conversation.ask(operation, self._number, [encode_one(value) for value in arguments], pairs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # special methods are not forwarded, except those below
        return self._conversation.ask("attribute", self._number, name)

    def __getitem__(self, key: Any) -> Any:
        return self._conversation.ask("item", self._number, self._conversation.encode(key))

    def __iter__(self) -> Any:
        return self._conversation.ask("iter", self._number)

    def __next__(self) -> Any:
        return self._conversation.ask("next", self._number)

    def __len__(self) -> int:
        return int(self._conversation.ask("len", self._number))

    def __bool__(self) -> bool:
        return True


def call_for_effect(function: Any) -> Any:
    """Wrap the function of a statement `f(x)` so that x is updated afterwards, because the test checks the change.

    Elsewhere arguments are passed by value: a solution must not pass `f(x) == sorted(x)` by emptying x.
    """
    if not isinstance(function, Remote):
        return function

    def call(*arguments: Any, **named: Any) -> Any:
        value, changed = function._call("call in place", arguments, named)
        for argument, new in zip(arguments, changed, strict=True):
            _bring_up_to_date(argument, new)
        return value

    return call


def _bring_up_to_date(argument: Any, new: Any) -> None:
    if type(argument) is not type(new):
        return
    if isinstance(argument, list):
        argument[:] = new
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(new)


class _CallsForEffect(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        if isinstance(node.value, ast.Call):
            name = ast.Name("call_for_effect", ast.Load())
            node.value.func = ast.Call(name, [node.value.func], [])
        return node


def parse_test(text: str) -> ast.Module:
    """Parse a test and mark calls made for their effect; raise SyntaxError."""
    tree: ast.Module = ast.fix_missing_locations(_CallsForEffect().visit(ast.parse(text)))
    return tree


def names_of_solution(trees: list[ast.Module], known: dict[str, Any], entry_point: str | None) -> list[str]:
    """Return the names that tests use but that neither they, their setup nor Python define; the entry point first.

    If there are none, the function under test has a builtin's name, and the builtins that the tests use are candidates.
    """
    used: set[str] = set()
    defined = {"call_for_effect"}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.alias):
                defined.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                defined.add(node.name)
    open_names = used - defined - set(known)
    if entry_point:
        return [entry_point, *sorted(open_names - {entry_point, *dir(builtins)})]
    return sorted(open_names - set(dir(builtins)) or open_names)


def run_tests(job: dict[str, Any], requests: BinaryIO, replies: BinaryIO, results: BinaryIO) -> None:
    """Run the tests and report each one: `[index, "passed" | "failed" | "unsupported", details]`.

    If the tests are not valid Python, report only `["bad", details]`; if the solution is not, only `["load", details]`.
    """
    conversation = Conversation(requests, replies)
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        conversation.answer()  # wait until the solution's process is up
    except (ConversationEnded, SolutionError):
        return
    try:
        exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), namespace)
        trees = [parse_test(text) for text in job["tests"]]
        programs = [compile(tree, "tests.py", "exec", dont_inherit=True) for tree in trees]
    except Exception as error:
        send(results, ["bad", f"{type(error).__name__}: {error}"])
        return
    try:
        conversation.answer()
        for name in names_of_solution(trees, namespace, job["entry_point"]):
            namespace.pop(name, None)  # do not test the setup's stub instead
            if conversation.ask("defines", name) is True:
                namespace[name] = conversation.ask("name", name)
    except BaseException as error:
        send(results, ["load", f"{type(error).__name__}: {error}"])
        return
    namespace["call_for_effect"] = call_for_effect
    for index, program in enumerate(programs):
        conversation.unsupported = ""
        try:
            exec(program, namespace)
            verdict = ["passed", ""]
        except BaseException as error:  # whatever the exception, the test did not pass
            verdict = ["failed", f"{type(error).__name__}: {error}"[:500]]
        if conversation.unsupported:
            verdict = ["unsupported", conversation.unsupported]
        send(results, [index, *verdict])
