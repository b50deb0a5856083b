"""A chat endpoint on loopback that answers in OpenAI's format; its judge is a Python function."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rewards.base import RewardContext
from rewards.judge.reward import JudgeReward

RIGHT = ("42", "43", "Canberra", "366")
"""A response that holds one of these is right: the first is the tests', the others are those of the probe."""


@dataclass(frozen=True)
class Asked:
    """One request, as the server got it."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    raw: bytes
    """The body, byte for byte."""

    @property
    def user(self) -> str:
        """The question."""
        text: str = self.body["messages"][1]["content"]
        return text

    @property
    def responses(self) -> list[str]:
        """The responses in it, in their order."""
        return re.findall(rf"<<<RESPONSE[^\n]* {self.fence}\n(.*?)\n{self.fence} RESPONSE", self.user, re.DOTALL)

    @property
    def fence(self) -> str:
        """What the system message says that material is fenced off with."""
        return re.findall(r"`<<<NAME (\w+)`", self.body["messages"][0]["content"])[0]


@dataclass(frozen=True)
class Reply:
    """What the server answers."""

    content: Any = None
    """Text of the chat completion."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """A body in place of a chat completion."""
    after_seconds: float = 0.0
    usage: bool = True


def is_right(response: str) -> bool:
    return any(mark in response for mark in RIGHT)


def verdict(asked: Asked, likes: Callable[[str], bool] = is_right) -> dict[str, Any]:
    """The verdict of a judge who gives 10 or 1, in the form that was asked for."""
    responses = asked.responses
    if '"winner"' in asked.user or "`Winner: A`" in asked.user:
        first, second = (likes(response) for response in responses)
        return {"reasoning": "compared", "winner": "tie" if first == second else "A" if first else "B"}
    scores = [10 if likes(response) else 1 for response in responses]
    if len(scores) == 1:
        return {"reasoning": "looked", "score": scores[0]}
    return {"reasoning": "looked", "scores": {str(i + 1): score for i, score in enumerate(scores)}}


def honest(asked: Asked) -> Reply:
    """Right responses get 10, others 1."""
    return Reply(json.dumps(verdict(asked)))


class JudgeServer:
    """`with JudgeServer() as server: ...server.url...`; `server.judge` may be replaced at any time."""

    def __init__(self, judge: Callable[[Asked], Reply] = honest, port: int = 0) -> None:
        self.judge = judge
        self.asked: list[Asked] = []
        self.open, self.most_open = 0, 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw)
                if outer._closing.is_set():
                    self.close_connection = True
                    return
                status, headers, content = outer._answer(Asked(body, dict(self.headers), self.path, raw))
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that gave up waiting
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        with self._lock:
            self.asked.append(asked)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        reply = self.judge(asked)
        self._closing.wait(reply.after_seconds)
        with self._lock:
            self.open -= 1
        if reply.raw is not None:
            return reply.status, reply.headers, reply.raw
        if reply.status != 200:
            return reply.status, reply.headers, json.dumps({"error": {"message": "as told"}}).encode()
        message = {"role": "assistant", "content": reply.content}
        answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "model": asked.body["model"]}
        answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
        if reply.usage:
            answer["usage"] = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        return 200, {"Content-Type": "application/json", **reply.headers}, json.dumps(answer).encode()


def started(server: JudgeServer, **options: Any) -> JudgeReward:
    """A reward whose start-up questions are not counted."""
    options = {"probe": "off", "timeout_seconds": 20.0, **options}
    reward = JudgeReward(JudgeReward.Config(base_url=server.url, model="judge", **options), RewardContext())
    reward.start()
    server.asked.clear()
    return reward
