"""The HTTP client of the rewards, against a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from rewards.services.http import (
    BlockingHttpClient,
    HttpClient,
    Limits,
    OutOfTimeError,
    RefusedError,
    TransientError,
    get,
    json_body,
)

Reply = tuple[int, bytes, dict[str, str]]
GONE = "http://127.0.0.1:9/score"
QUICK = Limits(attempts=3, first_pause=0.01, longest_pause=0.05)


class Service(ThreadingHTTPServer):
    """Answers what `reply` says to the n-th request (from 1)."""

    daemon_threads = True

    def __init__(self, reply: Callable[[int], Reply], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.open, self.most_open = 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.answer(b"null")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes) -> None:
        server = self.server
        with server.lock:
            server.bodies.append(json.loads(body))
            server.headers.append(dict(self.headers))
            number = len(server.bodies)
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        status, content, headers = server.reply(number)
        with server.lock:
            server.open -= 1
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


OK: Reply = (200, b'{"score": 1}', {})


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def start(reply: Callable[[int], Reply] = lambda number: OK) -> Service:
        service = Service(reply)
        services.append(service)
        threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return service

    yield start
    for service in services:
        service.shutdown()
        service.server_close()


def score(answer: httpx.Response) -> Any:
    return answer.json()["score"]


def post(*urls: str, limits: Limits = QUICK, seconds: float = 10.0, body: Any = b"{}", **options: Any) -> Any:
    async def run() -> Any:
        async with HttpClient(urls, limits, **options) as http:
            return await http.post(body, time.monotonic() + seconds, score)

    return asyncio.run(run())


def once(status: int, content: bytes = b"busy", **headers: str) -> Callable[[int], Reply]:
    """One such answer, then good ones."""
    return lambda number: (status, content, headers) if number == 1 else OK


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_tried_again(serve: Callable[..., Service], status: int) -> None:
    service = serve(once(status))
    assert post(service.url) == 1
    assert len(service.bodies) == 2


@pytest.mark.parametrize("status", [204, 301, 400, 401, 404, 413, 422, 501, 505])
def test_what_would_be_the_same_again_is_refused_at_once(serve: Callable[..., Service], status: int) -> None:
    service = serve(once(status, b"" if status == 204 else b"no " * 400))
    with pytest.raises(RefusedError) as error:
        post(service.url)
    assert error.value.status == status and len(service.bodies) == 1
    assert str(error.value) == f"{service.url}: HTTP {status}: {error.value.answer}"
    assert len(error.value.answer) in (0, 300), "messages quote the beginning only"


def test_tries_are_bounded_and_counted(serve: Callable[..., Service]) -> None:
    service = serve(lambda number: (500, b"a bug", {}))
    with pytest.raises(TransientError, match=r"/score: HTTP 500: a bug$") as error:
        post(service.url)
    assert (error.value.tries, error.value.status, error.value.answer) == (3, 500, "a bug")
    assert len(service.bodies) == 3


def test_a_reader_may_ask_for_another_try_and_other_errors_of_its_are_raised(serve: Callable[..., Service]) -> None:
    def read(answer: httpx.Response) -> str:
        if answer.text == "later":
            raise TransientError(str(answer.url), "not now")
        raise LookupError(answer.text)

    async def run(service: Service) -> None:
        async with HttpClient([service.url], QUICK) as http:
            await http.post(b"{}", time.monotonic() + 10, read)

    service = serve(once(200, b"later"))
    with pytest.raises(LookupError, match='"score"'):
        asyncio.run(run(service))
    assert len(service.bodies) == 2


def test_a_server_says_how_long_to_wait_up_to_a_limit(serve: Callable[..., Service]) -> None:
    def seconds(retry_after: str, **limits: Any) -> float:
        began = time.monotonic()
        options = {"attempts": 3, "first_pause": 0.01, "longest_pause": 0.2, **limits}
        assert post(serve(once(429, **{"Retry-After": retry_after})).url, limits=Limits(**options)) == 1
        return time.monotonic() - began

    assert seconds("0.6", longest_retry_after=5) >= 0.6
    assert 0.2 <= seconds("3600") < 2, "cut to the longest pause"
    for odd in ("-1", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"):
        assert seconds(odd) < 2


def test_a_pause_beyond_the_deadline_is_not_waited_for(serve: Callable[..., Service]) -> None:
    service = serve(lambda number: (429, b"busy", {"Retry-After": "3600"}))
    began = time.monotonic()
    with pytest.raises(OutOfTimeError) as error:
        post(service.url, limits=Limits(attempts=4, longest_retry_after=float("inf")), seconds=5)
    assert error.value.last is not None and (error.value.last.status, error.value.last.retry_after) == (429, 3600)
    assert time.monotonic() - began < 2 and len(service.bodies) == 1


def test_without_a_number_of_attempts_the_deadline_ends_the_tries() -> None:
    began = time.monotonic()
    with pytest.raises(OutOfTimeError, match=r"127\.0\.0\.1:9/score: out of time; last: .*ConnectError") as error:
        post(GONE, limits=Limits(first_pause=0.01, longest_pause=0.05), seconds=0.5)
    assert error.value.last is not None and error.value.last.tries > 2
    assert time.monotonic() - began < 2


def test_one_try_has_a_limit_and_so_has_the_whole(serve: Callable[..., Service]) -> None:
    def slow_once(number: int) -> Reply:
        time.sleep(2 if number == 1 else 0)
        return OK

    assert post(serve(slow_once).url, limits=Limits(attempts=2, try_seconds=0.3, first_pause=0.01)) == 1
    with pytest.raises(TransientError, match=r"no answer within 0\.3 s$") as error:
        post(serve(slow_once).url, limits=Limits(attempts=1, try_seconds=0.3))
    assert error.value.timed_out
    began = time.monotonic()
    with pytest.raises(OutOfTimeError, match=r"out of time$"):
        post(serve(slow_once).url, seconds=0.3)
    assert time.monotonic() - began < 1.5


def test_a_deadline_that_has_passed_sends_nothing(serve: Callable[..., Service]) -> None:
    service = serve()
    with pytest.raises(OutOfTimeError):
        post(service.url, seconds=-1.0)
    assert not service.bodies


def test_a_broken_body_is_tried_again(serve: Callable[..., Service]) -> None:
    assert post(serve(once(200, b"no gzip", **{"Content-Encoding": "gzip"})).url) == 1


def test_replicas_take_turns_and_a_dead_one_is_passed_over(serve: Callable[..., Service]) -> None:
    services = [serve(), serve()]

    async def run() -> None:
        async with HttpClient([services[0].url, GONE, services[1].url], QUICK) as http:
            for _ in range(4):
                await http.post(b"{}", time.monotonic() + 10, score)

    asyncio.run(run())
    assert [len(service.bodies) for service in services] == [2, 2]


def test_requests_at_a_time_are_bounded(serve: Callable[..., Service]) -> None:
    service = serve(lambda number: (time.sleep(0.05), OK)[1])

    async def run() -> list[Any]:
        async with HttpClient([service.url], Limits(attempts=1, concurrent=3)) as http:
            return await asyncio.gather(*(http.post(b"{}", time.monotonic() + 10, score) for _ in range(12)))

    assert asyncio.run(run()) == [1] * 12
    assert service.most_open == 3


def test_who_waited_for_a_slot_is_told_the_failure_of_another(serve: Callable[..., Service]) -> None:
    service = serve(lambda number: (time.sleep(0.25), (503, b"overloaded", {}))[1])

    async def run() -> list[Any]:
        async with HttpClient([service.url], Limits(concurrent=1, first_pause=0.01, longest_pause=0.02)) as http:
            calls = (http.post(b"{}", time.monotonic() + 0.6, score) for _ in range(4))
            return await asyncio.gather(*calls, return_exceptions=True)

    for error in asyncio.run(run()):
        assert isinstance(error, OutOfTimeError) and "overloaded" in str(error)


def test_a_body_may_be_made_for_each_try(serve: Callable[..., Service]) -> None:
    service = serve(once(503))
    assert post(service.url, body=lambda remaining: json_body({"seconds": remaining, "text": "\ud800"})) == 1
    first, second = service.bodies
    assert 10 >= first["seconds"] > second["seconds"] > 0
    assert second["text"] == "\ud800", "what UTF-8 cannot encode arrives"

    def none_left(_: float) -> bytes:
        raise LookupError("no budget")

    with pytest.raises(LookupError, match="no budget"):
        post(service.url, body=none_left)
    assert len(service.bodies) == 2


def test_a_token_is_sent(serve: Callable[..., Service]) -> None:
    service = serve()
    post(service.url, token="secret")
    post(service.url)
    assert get(service.url, 5, "secret").json() == {"score": 1}
    assert [headers.get("Authorization") for headers in service.headers] == ["Bearer secret", None, "Bearer secret"]
    assert service.headers[0]["Content-Type"] == "application/json"


def test_retries_are_logged_where_wanted(serve: Callable[..., Service], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rewards.services.http"):
        post(serve(once(503)).url)
        assert not caplog.text
        post(serve(once(503)).url, log_retries=True)
    assert "/score: HTTP 503: busy; try 2 of 3" in caplog.text


def test_a_get_takes_any_status_and_tries_once(serve: Callable[..., Service]) -> None:
    service = serve(once(503))
    assert get(service.url, 5).status_code == 503 and len(service.bodies) == 1
    with pytest.raises(TransientError, match=r"127\.0\.0\.1:9/score: ConnectError"):
        get(GONE, 5)


def test_threads_share_a_blocking_client(serve: Callable[..., Service]) -> None:
    service = serve(lambda number: (time.sleep(0.05), OK)[1])
    client = BlockingHttpClient([service.url], Limits(attempts=1, concurrent=2))
    with ThreadPoolExecutor(6) as threads:
        scores = list(threads.map(lambda _: client.post(b"{}", time.monotonic() + 10, score), range(6)))
    assert scores == [1] * 6 and service.most_open == 2
    with pytest.raises(OutOfTimeError):
        client.post(b"{}", time.monotonic() - 1, score)
    client.close()
    assert not any(thread.name == "http" for thread in threading.enumerate())
