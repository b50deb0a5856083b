"""A verdict that the judged code cannot make up: every trick here must lose, and honest code must win."""

from __future__ import annotations

import textwrap

import pytest
from sandbox_fixture import impatient, judge, run, sandbox, soon  # noqa: F401

from rewards.code.judge import AssertTests, BadTests, CallTests, InputOutputTests, Judge, Tests
from rewards.services.sandbox import Unavailable
from rewards.services.sandbox.bubblewrap import Bubblewrap

ASSERTS = AssertTests(
    ("assert f(2) == 4", "assert sorted(f(x) for x in (1, 3)) == [1, 9]", "assert abs(f(0.5) - 0.25) < 1e-9")
)
CALLS = CallTests("f", ([2], [3], [0.5]), (4, 9, 0.25))
HONEST = "def f(x):\n    return x * x\n"

TRICKS = {
    "ends before the tests": "import os\nos._exit(0)",
    "ends with success": "import sys\nsys.exit(0)",
    "ends inside a test": "import os\ndef f(x): os._exit(0)",
    "raises SystemExit in a test": "def f(x): raise SystemExit(0)",
    "raises KeyboardInterrupt in a test": "def f(x): raise KeyboardInterrupt",
    "prints what success may look like": "print('passed', '\"ready\"', '[0, \"passed\", \"\"]', 'OK', flush=True)",
    "is equal to everything": """
        class Anything(int):
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
            __lt__ = __gt__ = __le__ = __ge__ = __eq__
            __sub__ = __rsub__ = __abs__ = __add__ = lambda self, *other: self
            __hash__ = lambda self: 0
        def f(x): return Anything(7)
    """,
    "is equal to everything, and no number": """
        class Anything:
            __eq__ = __lt__ = __gt__ = __le__ = lambda self, other: True
            __sub__ = __abs__ = lambda self, *other: self
            __hash__ = lambda self: 0
        def f(x): return Anything()
    """,
    "patches builtins": """
        import builtins
        builtins.sorted = builtins.abs = builtins.sum = lambda *args: 0
        builtins.AssertionError = type("Silent", (Exception,), {})
        class Equal(list):
            __eq__ = lambda self, other: True
        builtins.sorted = builtins.list = Equal
        def f(x): return 0
    """,
    "shadows the builtins that the tests use": "def sorted(x): return [1, 9]\ndef abs(x): return 0\ndef f(x): return 0",
    "patches the inner programs": """
        import sys
        for name, module in list(sys.modules.items()):
            if name.startswith("rewards"):
                for attribute in list(vars(module)):
                    if callable(getattr(module, attribute)):
                        setattr(module, attribute, lambda *args, **named: True)
        def f(x): return 0
    """,
    "looks for the tests in frames, objects, memory and files": """
        import gc, os, sys, re
        found = set()
        def look(text):
            found.update(re.findall(r"f\\((\\d+)\\) == (\\d+)", text))
        def f(x):
            frame = sys._getframe()
            while frame:
                look(str(frame.f_locals) + str(frame.f_globals))
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, (str, bytes, list, dict)):
                    look(str(thing)[:10000])
            for name in os.listdir("/proc"):
                if name.isdigit():
                    for file in ("cmdline", "environ"):
                        try: look(open(f"/proc/{name}/{file}").read())
                        except OSError: pass
            for path in ("/dev/stdin", "/proc/self/fd/0"):
                try: look(open(path).read())
                except OSError: pass
            for argument, value in found:
                if float(argument) == x: return int(value)
    """,
    "writes verdicts into every open file": """
        import os
        def f(x):
            for number in range(3, 64):
                for text in (b'[0, "passed", ""]\\n[1, "passed", ""]\\n', b'["value", true]\\n' * 9):
                    try: os.write(number, text)
                    except OSError: pass
            return 0
    """,
    "sends garbage": """
        import os
        def f(x):
            for number in range(3, 64):
                try: os.write(number, b"\\xff{[" * 1000 + b"\\n")
                except OSError: pass
    """,
    "sends deep garbage": """
        import os
        def f(x):
            for number in range(3, 64):
                try: os.write(number, b"[" * 100000 + b"\\n")
                except OSError: pass
    """,
    "closes every file": "import os\nos.closerange(0, 100)\ndef f(x): return 0",
    "ends loops of the tests": "def f(x): raise StopIteration",
    "returns nothing": "def f(x): pass",
    "returns itself": "def f(x): return f",
    "returns what contains itself": "def f(x):\n    y = []\n    y.append(y)\n    return y",
    "kills whom it can": "import os, signal\ndef f(x):\n    os.kill(-1, signal.SIGKILL)",
    "runs away": "def f(x):\n    while True: pass",
    "is no Python": "def f(x:",
    "is not there": "",
    "is no text": "\ud800",
    "has a null byte": "def f(x): return x * x\n\0",
}


def dedented(code: str) -> str:
    return textwrap.dedent(code)


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("tests", [ASSERTS, CALLS], ids=["asserts", "calls"])
def test_a_trick_passes_no_test(impatient: Bubblewrap, tests: Tests, trick: str) -> None:  # noqa: F811
    verdict = judge(impatient, dedented(TRICKS[trick]), tests)
    assert verdict.passed == 0, verdict
    assert verdict.total == 3
    assert verdict.timeout == (trick == "runs away"), verdict


@pytest.mark.parametrize("trick", ["ends before the tests", "ends with success", "is equal to everything"])
def test_these_tricks_win_where_code_and_tests_share_a_process(sandbox: Bubblewrap, trick: str) -> None:  # noqa: F811
    """The control of the test above."""
    together = "\n".join([dedented(TRICKS[trick]), *ASSERTS.tests])
    assert run(sandbox, together).exit_code == 0
    assert run(sandbox, "\n".join(["def f(x): return 0", *ASSERTS.tests])).exit_code == 1


@pytest.mark.parametrize("tests", [ASSERTS, CALLS], ids=["asserts", "calls"])
def test_honest_code_passes(sandbox: Bubblewrap, tests: Tests) -> None:  # noqa: F811
    assert judge(sandbox, HONEST, tests).passed == 3
    assert judge(sandbox, "print('loading')\n" + HONEST + "print('ready', f(3))", tests).passed == 3


@pytest.mark.parametrize(
    "code",
    [
        "import os; print(4); os._exit(1)",
        "print(4); raise ValueError",
        "print(4); print(4)",
        "print(44)",
        "print('passed')",
        "import os\nos._exit(0)",
        "import sys\nsys.stderr.write('4')",
        "print(open('/dev/stdin').read())",
        "import time\nprint(4, flush=True)\ntime.sleep(500)",
        "print(4)\nwhile True: print()",
    ],
)
def test_a_program_must_print_the_expected_output_and_end_well(impatient: Bubblewrap, code: str) -> None:  # noqa: F811
    assert judge(impatient, code, InputOutputTests(("2\n",), ("4\n",))).passed == 0


def test_programs_with_standard_input(sandbox: Bubblewrap) -> None:  # noqa: F811
    tests = InputOutputTests(("2\n", "3", "4\n5"), ("4", "9\n", "16 \n\n"))
    for code in (
        "x = int(input())\nprint(x * x)",
        "import sys\nprint(int(sys.stdin.readline()) ** 2)",
        "print(int(open(0).read().split()[0]) ** 2, end='')",
        "if __name__ == '__main__':\n    print(int(open('/dev/stdin').readline()) ** 2)\n    exit()",
    ):
        assert judge(sandbox, code, tests).passed == 3, code
    some = judge(sandbox, "print(4)", tests)
    assert (some.passed, some.total) == (1, 3) and "expected '9" in some.trace
    first_failure_is_the_last_run = judge(sandbox, "print(16)", tests, every_test=False)
    assert first_failure_is_the_last_run.passed == 0


def test_large_input_and_output(sandbox: Bubblewrap) -> None:  # noqa: F811
    numbers = " ".join(map(str, range(30000)))
    assert judge(sandbox, "print(input())", InputOutputTests((numbers,), (numbers,))).passed == 1


def test_what_values_may_be(sandbox: Bubblewrap) -> None:  # noqa: F811
    code = """
        import collections, datetime, decimal, enum, fractions
        def same(x): return x
        class Color(enum.IntEnum):
            RED = 1
        Pair = collections.namedtuple("Pair", "a b")
        def made(): return [Color.RED, Pair(1, 2), collections.Counter("aab"), collections.OrderedDict(a=1)]
        def count():
            n = 0
            while True:
                n += 1
                yield n
        def adder(n): return lambda x: x + n
        class Stack:
            def __init__(self): self.items = []
            def push(self, x): self.items.append(x); return self
            def __len__(self): return len(self.items)
            def __getitem__(self, i): return self.items[i]
        def sort(items): items.sort()
        def remove(items): items.clear(); return []
        def wrong(): raise ValueError("no")
        def odd(): raise type("Mine", (KeyError,), {})("x")
        LIMIT = 7
    """
    tests = (
        "v = [None, True, 1, -2**80, 10**5000, 1.5, float('inf'), 'ä\\ud800', b'x', bytearray(b'y'), 1j]\n"
        "assert same(v) == v and [type(x) for x in same(v)] == [type(x) for x in v]",
        "v = {(1, 2): {3}, 'a': frozenset([4]), None: [range(3), ()]}\nassert same(v) == v",
        "import collections, datetime, decimal, fractions\n"
        "v = [decimal.Decimal('1.10'), fractions.Fraction(1, 3), datetime.date(2020, 1, 2),"
        " datetime.timedelta(1, 2), datetime.datetime(2020, 1, 2, 3, 4, 5, 6)]\nassert same(v) == v",
        "import collections\nv = collections.deque([1])\nassert same(v) == v",
        "import math\nassert math.isnan(same(float('nan')))",
        "assert made() == [1, (1, 2), {'a': 2, 'b': 1}, {'a': 1}]",
        "c = count()\nassert [next(c), next(c)] == [1, 2] and next(iter(c)) == 3",
        "assert adder(3)(4) == 7 and list(map(adder(1), [1, 2])) == [2, 3]",
        "s = Stack()\ns.push(1).push(2)\nassert len(s) == 2 and s[0] == 1 and list(s) == [1, 2] and s.items == [1, 2]",
        "x = [3, 1, 2]\nsort(x)\nassert x == [1, 2, 3]",
        "x = [3, 1]\nassert remove(x) == [] and x == [3, 1], 'by value inside an expression'",
        "try:\n    wrong()\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert False",
        "assert LIMIT == 7",
        "assert same(x=5) == 5",
    )
    verdict = judge(sandbox, dedented(code), AssertTests(tests))
    assert verdict.passed == len(tests), verdict.trace


def test_a_function_named_like_a_builtin_is_found_where_nothing_else_is_tested(sandbox: Bubblewrap) -> None:  # noqa: F811
    tests = AssertTests(("assert sum(10, 15) == 6",))
    assert judge(sandbox, "def sum(a, b): return 6", tests).passed == 1
    assert judge(sandbox, "def other(a, b): return 6", tests).passed == 0


def test_the_setup_serves_both_and_is_not_the_codes_to_change(sandbox: Bubblewrap) -> None:  # noqa: F811
    setup = 'import math\n\ndef helper(x):\n    return x + 1\n\ndef f(x: int) -> int:\n    """Doc."""\n'
    test = (
        "def check(candidate):\n    assert candidate(1) == helper(1) == 2\n    assert math.sqrt(4) == 2\n\ncheck(f)\n"
    )
    tests = AssertTests((test,), setup, "f")
    assert judge(sandbox, "def f(x):\n    return helper(x)", tests).passed == 1
    assert judge(sandbox, "    return helper(x)", tests).passed == 1, "the end of the setup"
    assert judge(sandbox, "def helper(x): return 0\ndef f(x): return 0", tests).passed == 0
    assert judge(sandbox, "def g(x): return 2", tests).passed == 0, "the stub is not the solution"


def test_state_lives_through_the_tests_of_a_program(sandbox: Bubblewrap) -> None:  # noqa: F811
    code = "n = 0\ndef f():\n    global n\n    n += 1\n    return n"
    assert judge(sandbox, code, AssertTests(("assert f() == 1", "assert f() == 2"))).passed == 2


def test_calls_compare_as_json(sandbox: Bubblewrap) -> None:  # noqa: F811
    def passes(returned: str, expected: object) -> bool:
        return judge(sandbox, f"def f(): return {returned}", CallTests("f", ([],), (expected,))).passed == 1

    assert passes("(1, [2.0])", [1, [2]])
    assert passes("{1: 0.1 + 0.2}", {"1": 0.3})
    assert passes("7", [7]), "APPS wraps the one expected value in a list"
    assert not passes("True", 1) and not passes("1", True)
    assert not passes("'7'", 7) and not passes("[7, 7]", [7]) and not passes("object()", None)
    in_class = "class Solution:\n    def f(self, x): return x + 1"
    assert judge(sandbox, in_class, CallTests("f", ([1], [2]), (2, 3))).passed == 2
    verdict = judge(sandbox, "def f(x): return 1 / x", CallTests("f", ([1], [0], [2]), (1, 0, 0.5)))
    assert verdict.passed == 2 and "ZeroDivisionError" in verdict.trace


def test_tests_that_cannot_be_run_are_not_the_codes_fault(sandbox: Bubblewrap) -> None:  # noqa: F811
    for tests, message in (
        (AssertTests(("assert f( == 1",)), "SyntaxError"),
        (AssertTests(("assert f(1) == 1",), setup="import no_such_module"), "no_such_module"),
        (AssertTests(("assert f(lambda x: x) == 1",)), "hands a function"),
        (AssertTests(("try:\n    f(object())\nexcept Exception:\n    pass",)), "hands a object"),
    ):
        with pytest.raises(BadTests, match=message):
            judge(sandbox, "def f(x): return x", tests)
    with pytest.raises(Unavailable, match="the process of the tests died"):
        judge(sandbox, "def f(x): return x", AssertTests(("import os\nos._exit(0)", "assert f(1) == 1")))


def test_the_share_of_tests_and_what_became_of_the_rest(impatient: Bubblewrap) -> None:  # noqa: F811
    tests = AssertTests(("assert f(1) == 1", "assert f(2) == 0", "assert f(3) == 3", "assert f(4) == 4"))
    assert judge(impatient, "def f(x): return x", tests).passed == 3
    died = judge(impatient, "import os\ndef f(x): return x if x < 3 else os._exit(0)", tests)
    assert died.passed == 1
    hung = judge(impatient, "def f(x):\n    while x > 2: pass\n    return x", tests)
    assert (hung.passed, hung.timeout) == (1, True) and "took too long" in hung.trace


def test_an_exception_that_ends_loops_does_not_pass_a_test_made_of_one(sandbox: Bubblewrap) -> None:  # noqa: F811
    """In one process, `all(map(f, ...))` is true if f raises StopIteration at once."""
    tests = AssertTests(("assert all(map(f, [1, 2]))", "assert all(f(x) for x in [1, 2])"))
    assert judge(sandbox, "def f(x): raise StopIteration", tests).passed == 0
    assert judge(sandbox, "def f(x): return x > 0", tests).passed == 2


def test_the_first_line_of_a_run_is_not_the_programs_to_write(sandbox: Bubblewrap) -> None:  # noqa: F811
    """A sandbox that never stood is unavailable, one whose program ends at once is not."""
    assert run(sandbox, "import os; os._exit(9)").exit_code == 9
    assert Judge(sandbox, True, 0.0).judge("import os; os._exit(9)", CALLS, soon()).passed == 0
