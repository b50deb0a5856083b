"""`isolation=http`: a client of SandboxFusion's `/run_code`, against a small service that answers in its format."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fusion_service import NO_GZIP, Service
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.code.judge import AssertTests, CallTests, InputOutputTests, Judge
from rewards.code.reward import CodeReward
from rewards.services.sandbox import Limits, Unavailable
from rewards.services.sandbox.fusion import SandboxFusion
from rlkit.experience import Group

LIMITS = Limits(wall_seconds=20.0, cpu_seconds=5, memory_mib=512, processes=8, file_mib=4, output_kib=256)


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    service = Service()
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    yield service
    service.shutdown()
    service.server_close()
    thread.join(10)


@pytest.fixture
def service(running: Service) -> Service:
    running.replies.clear()
    running.requests.clear()
    running.headers.clear()
    running.most_at_once = 0
    return running


@pytest.fixture
def client(service: Service) -> Iterator[SandboxFusion]:
    client = SandboxFusion(service.url, LIMITS, token_variable=None, max_tries=3)
    client.start()
    service.requests.clear()
    yield client
    client.close()


def soon() -> float:
    return time.monotonic() + 60.0


def reward(**options: Any) -> CodeReward:
    return CodeReward(CodeReward.Config(isolation="http", **options), RewardContext())


def group(tests: Any, *codes: str) -> Group:
    made = make_group("g", [f"```python\n{code}\n```" for code in codes])
    return replace(made, prompt=replace(made.prompt, columns={"tests": tests}))


def test_programs_calls_and_asserts(client: SandboxFusion) -> None:
    judge = Judge(client, every_test=True, float_tolerance=1e-6)
    program = InputOutputTests(("2", "3"), ("4", "9"))
    assert judge.judge("print(int(input()) ** 2)", program, soon()).passed == 2
    assert judge.judge("print(4)", program, soon()).passed == 1
    assert judge.judge("print(4)\nraise SystemExit(1)", program, soon()).passed == 0
    calls = CallTests("f", ([2], [3]), (4, 9))
    assert judge.judge("print('noise')\ndef f(x): return x * x", calls, soon()).passed == 2
    assert judge.judge("def f(x): return 4", calls, soon()).passed == 1
    asserts = AssertTests(("assert f(2) == 4", "assert f(3) == 9"))
    assert judge.judge("print('noise')\ndef f(x): return x * x", asserts, soon()).passed == 2
    assert judge.judge("def f(x): return 4", asserts, soon()).passed == 1


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        'print(\'[0, "passed", ""]\')',
        "class A(int):\n    __eq__ = lambda *args: True\n    __hash__ = None\ndef f(x): return A()",
        # The tests and the mark are in the parent process, which must not be open to this one.
        "import os\nfor name in ('mem', 'environ', 'fd/1', 'fd/5'):\n    try:\n"
        "        open(f'/proc/{os.getppid()}/{name}', 'r+b', 0).write(b'[0, \"passed\", \"\"]\\n')\n"
        "    except OSError: pass\n",
        'import os\ndef f(x):\n    for n in range(3, 50):\n        try: os.write(n, b\'[0, "passed", ""]\\n\')\n'
        "        except OSError: pass\n    return 0",
    ],
)
def test_a_trick_passes_no_test(client: SandboxFusion, code: str) -> None:
    judge = Judge(client, every_test=True, float_tolerance=0.0)
    assert judge.judge(code, AssertTests(("assert f(2) == 8",)), soon()).passed == 0
    if "getppid" not in code:  # there the parent would be this process, which the little service does not protect
        assert judge.judge(code, CallTests("f", ([2],), (8,)), soon()).passed == 0


def test_expected_values_never_reach_the_service_but_for_asserts(client: SandboxFusion, service: Service) -> None:
    judge = Judge(client, every_test=True, float_tolerance=0.0)
    judge.judge("def f(x): return x", CallTests("f", ([1],), ("expected-value",)), soon())
    judge.judge("print(input())", InputOutputTests(("1",), ("expected-value",)), soon())
    assert len(service.requests) == 2
    assert not any("expected-value" in json.dumps(request) for request in service.requests)


def test_the_services_time_limit_is_the_codes_fault(service: Service) -> None:
    quick = SandboxFusion(service.url, replace(LIMITS, wall_seconds=1.0), None, 1)
    quick.start()
    verdict = Judge(quick, True, 0.0).judge("while True: pass", InputOutputTests(("",), ("",)), soon())
    quick.close()
    assert (verdict.passed, verdict.timeout) == (0, True)


@pytest.mark.slow
def test_tests_that_passed_before_a_time_out_count(service: Service) -> None:
    quick = SandboxFusion(service.url, replace(LIMITS, wall_seconds=4.0), None, 1)
    quick.start()
    judge = Judge(quick, every_test=True, float_tolerance=0.0)
    slow = "import time\ndef f(x):\n    if x == 3: time.sleep(60)\n    return x"
    for tests in (
        AssertTests(tuple(f"assert f({n}) == {n}" for n in (1, 2, 3))),
        CallTests("f", ([1], [2], [3]), (1, 2, 3)),
    ):
        verdict = judge.judge(slow, tests, soon())
        assert (verdict.passed, verdict.total, verdict.timeout) == (2, 3, True)
    quick.close()


def test_what_others_write_between_the_results_is_none(client: SandboxFusion, service: Service) -> None:
    """Also earlier lines that are repeated, which the little service adds."""
    judge = Judge(client, every_test=True, float_tolerance=0.0)
    tests = AssertTests(("assert f(1) == 1", "assert f(2) == 2"))
    service.interjected[:] = ['[1, "passed", ""]\n', f'{"0" * 64} [1, "passed", ""]\n']
    try:
        honest, wrong = (judge.judge(code, tests, soon()) for code in ("def f(x): return x", "def f(x): return 1"))
    finally:
        service.interjected.clear()
    assert (honest.passed, wrong.passed) == (2, 1)


TROUBLE = {"status": "SandboxError", "message": "no cgroup", "compile_result": None, "run_result": None, "files": {}}


@pytest.mark.parametrize("reply", [(503, {}), (429, {}), (500, {"detail": "x"}), (200, TROUBLE), (200, NO_GZIP)])
def test_trouble_of_the_service_is_tried_again(client: SandboxFusion, service: Service, reply: tuple[int, Any]) -> None:
    service.replies = [reply]
    assert client.run_program("print(7)", "", soon()).stdout == b"7\n"
    assert len(service.requests) == 2
    service.replies = [reply] * 9
    with pytest.raises(Unavailable):
        client.run_program("print(7)", "", soon())
    assert len(service.requests) == 2 + 3, "max_tries"


@pytest.mark.parametrize("reply", [(422, {"detail": "wrong"}), (401, {}), (200, {"stdout": "7"}), (200, ["what"])])
def test_a_refusal_is_not_tried_again(client: SandboxFusion, service: Service, reply: tuple[int, Any]) -> None:
    service.replies = [reply]
    with pytest.raises(Unavailable, match=r"refuses the request with 4|does not answer like SandboxFusion"):
        client.run_program("print(7)", "", soon())
    assert len(service.requests) == 1


def test_trouble_is_invalid_and_never_zero(service: Service) -> None:
    unlucky = reward(url=service.url, max_tries=1)
    unlucky.start()
    service.replies = [(503, {})]
    (scores,) = unlucky.score([group(["assert f() == 1"], "def f(): return 1")])
    unlucky.close()
    assert (
        not scores.samples[0].valid
        and scores.samples[0].reason.startswith("sandbox: ")
        and "503" in scores.samples[0].reason
    )


def test_requests_at_a_time_are_bounded(service: Service) -> None:
    bounded = reward(url=service.url, processes=2)
    bounded.start()
    service.most_at_once = 0
    tests = {"inputs": [""], "outputs": ["0"]}
    (scores,) = bounded.score([group(tests, *(f"import time; time.sleep(0.2); print({n})" for n in range(6)))])
    bounded.close()
    assert [score.value for score in scores.samples] == [1, 0, 0, 0, 0, 0]
    assert service.most_at_once == 2


def test_a_token_is_taken_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"url": service.url, "token_variable": "SANDBOX_TOKEN"}
    monkeypatch.delenv("SANDBOX_TOKEN", raising=False)
    (message,) = CodeReward.check(CodeReward.Config(isolation="http", **options))
    assert "SANDBOX_TOKEN (token_variable) is not set" in message
    monkeypatch.setenv("SANDBOX_TOKEN", "abc")
    assert CodeReward.check(CodeReward.Config(isolation="http", **options)) == []
    with_token = reward(**options)
    with_token.start()
    with_token.close()
    assert service.headers[0]["Authorization"] == "Bearer abc"


def test_a_service_that_is_not_there(service: Service) -> None:
    assert CodeReward.check(CodeReward.Config(isolation="http", url="127.0.0.1:8080")) != []
    absent = SandboxFusion("http://127.0.0.1:9", LIMITS, None, max_tries=2)
    start = time.monotonic()
    with pytest.raises(Unavailable, match="cannot be reached"):
        absent.start()
    absent.close()
    assert time.monotonic() - start < 20


def test_the_callers_deadline_ends_the_tries(client: SandboxFusion, service: Service) -> None:
    patient = SandboxFusion(service.url, LIMITS, token_variable=None, max_tries=9)
    patient.start()
    service.requests.clear()
    service.replies = [(503, {})] * 9
    with pytest.raises((Unavailable, TimeoutError)):
        patient.run_program("print(7)", "", time.monotonic() + 0.3)
    patient.close()
    assert len(service.requests) <= 4, "pauses are random; five requests come once in 10,000 times"
    service.replies.clear()
    with pytest.raises(TimeoutError):
        client.run_program("import time; time.sleep(5)", "", time.monotonic() + 1.0)
