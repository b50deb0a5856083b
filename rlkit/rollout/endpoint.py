"""The policy over HTTP, for agents that run their own loop: one server per rollout worker, in its event loop.

    agent (its own process, any client)  --HTTP, loopback-->  Server  ->  Session of its token  ->  RolloutWorker.turn

Routes: `/sessions/TOKEN/v1/chat/completions` and `/v1/models` as in OpenAI's API, and
`/sessions/TOKEN/inference/v1/generate`, vLLM's tokens in, tokens out. A token stands for one episode; anyone who knows
it may call. `session.py` turns calls into conversations.

The run decides how to sample: a call's temperature, seed and the like have no effect, which the log says once. Options
that would change the meaning of an answer (several choices, stop texts, forced tools, structured output) are refused.
Errors have status 400, which no client retries, or 410 once the episode has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import uvicorn
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlkit.environments.agent import Endpoint
from rlkit.environments.tool import Tool
from rlkit.experience import Message, ToolCall, UserError
from rlkit.rollout.rendering import Renderer
from rlkit.rollout.session import Answer, RefusedError, Session

log = logging.getLogger(__name__)

MODEL = "policy"
MOST_RENDERERS = 256
"""There is one per list of tools; an agent may describe its tools differently in each episode."""
RETRIES = "x-stainless-retry-count"
"""Header of OpenAI's clients: the number of this retry of a call."""
OF_THE_RUN = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stop": ([], ""), "tool_choice": ("auto",), "response_format": ({"type": "text"},),
    "top_logprobs": (0,), "logit_bias": ({},), "functions": ([],), "chat_template": (), "chat_template_kwargs": ({},),
    "structured_outputs": (), "min_tokens": (0,), "ignore_eos": (False,), "bad_words": ([],), "allowed_token_ids": (),
    "prompt_logprobs": (), "features": (), "content_parts": (), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "output_mode": ("tokens",),
}  # fmt: skip
"""Field -> values, other than null, that change nothing."""


class _Function(BaseModel):
    name: str
    arguments: str | None = ""


class _Call(BaseModel):
    id: str = ""
    function: _Function


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Text] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str = ""


class _ToolFunction(BaseModel):
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class _Tool(BaseModel):
    type: Literal["function"]
    function: _ToolFunction


class _Chat(BaseModel):
    messages: list[_Message] = Field(min_length=1)
    tools: list[_Tool] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = False
    logprobs: bool | None = False
    return_token_ids: bool | None = False


class _Sampling(BaseModel):
    max_tokens: int | None = Field(default=None, ge=1)
    stop_token_ids: list[int] | None = None


class _Generate(BaseModel):
    token_ids: list[int] = Field(min_length=1)
    sampling_params: _Sampling
    stream: Literal[False] | None = False


class Server:
    def __init__(self, renderer_of: Callable[[Sequence[Tool]], Renderer], stop_token_ids: Sequence[int]) -> None:
        self._new_renderer, self._stops = renderer_of, set(stop_token_ids)
        self._renderers: dict[str, Renderer] = {}
        self._sessions: dict[str, Session] = {}
        self._ignored: set[str] = set()
        """Ignored fields that have been logged."""
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        routes = {
            "/v1/chat/completions": self._chat,
            "/inference/v1/generate": self._generate,
            "/v1/models": self._models,
        }
        app = Starlette(
            routes=[
                Route(f"/sessions/{{token}}{path}", answer, methods=["GET" if path.endswith("models") else "POST"])
                for path, answer in routes.items()
            ],
            exception_handlers={RefusedError: _refused},
        )
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._port = listener.getsockname()[1]
        # An agent's pause between two calls must not race with the timeout of an idle connection.
        options = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=3600)
        self._server = _Uvicorn(options)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def stop(self) -> None:
        if self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await self._serving

    def renderer(self, tools: Sequence[Tool]) -> Renderer:
        """Return the renderer for these tools. Raises UserError if the chat template cannot continue with them."""
        key = json.dumps([tool.schema() for tool in tools])
        renderer = self._renderers.pop(key, None)
        if renderer is None:
            renderer = self._new_renderer(tools)
            if problems := renderer.problems():
                raise UserError("; ".join(problems))
        self._renderers[key] = renderer  # now the most recently used
        if len(self._renderers) > MOST_RENDERERS:
            del self._renderers[next(iter(self._renderers))]
        return renderer

    @contextlib.contextmanager
    def session(self, session: Session) -> Iterator[Endpoint]:
        """Answer a session's calls until the block ends."""
        token = secrets.token_urlsafe(16)
        self._sessions[token] = session
        try:
            yield Endpoint(f"http://127.0.0.1:{self._port}/sessions/{token}/v1", token, MODEL)
        finally:
            session.seal()
            del self._sessions[token]

    def _session(self, request: Request) -> Session:
        token = request.path_params["token"]
        if token not in self._sessions:
            raise RefusedError("the episode at this address has ended", "episode_ended", 410)
        return self._sessions[token]

    async def _models(self, request: Request) -> Response:
        self._session(request)
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "rlkit"}]})

    async def _chat(self, request: Request) -> Response:
        session, body = self._session(request), await request.body()
        call = self._read(_Chat, body)
        tools = [Tool(t.function.name, t.function.description, t.function.parameters) for t in call.tools or ()]
        most = call.max_completion_tokens or call.max_tokens
        answer = await session.chat(b"chat " + body, _retried(request), _messages(call.messages), tools, most)
        completion = self._completion(call, answer)
        if call.stream:
            return StreamingResponse(_events(completion), media_type="text/event-stream")
        return JSONResponse(completion)

    async def _generate(self, request: Request) -> Response:
        session, body = self._session(request), await request.body()
        call = self._read(_Generate, body, within="sampling_params")
        if unknown := set(call.sampling_params.stop_token_ids or ()) - self._stops:
            names = ", ".join(map(str, sorted(unknown)))
            raise RefusedError(f"stop_token_ids: no turn of this policy ends with {names}", "unsupported")
        most = call.sampling_params.max_tokens
        answer = await session.generate(b"generate " + body, _retried(request), call.token_ids, most)
        response = answer.response
        pairs = zip(response.token_ids.tolist(), response.logprobs.tolist(), strict=True)
        content = [{"token_id": token, "logprob": logprob, "top_logprobs": []} for token, logprob in pairs]
        choice = {
            "index": 0,
            "token_ids": response.token_ids.tolist(),
            "finish_reason": response.finish_reason,
            "logprobs": {"content": content},
        }
        return JSONResponse({"request_id": response.id, "choices": [choice]})

    def _read(self, kind: type[Any], body: bytes, within: str = "") -> Any:
        """Parse a call. Raises RefusedError if it cannot be answered as requested."""
        try:
            fields = _loaded(body)
            call = kind.model_validate(fields)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise RefusedError(wrong, "invalid_request") from error
        except ValueError as error:
            raise RefusedError(f"the body is not JSON: {error}", "invalid_request") from error
        fields |= fields.get(within) or {}
        for name, neutral in NEUTRAL.items():
            if fields.get(name) is not None and fields[name] not in neutral:
                raise RefusedError(f"{name}={fields[name]!r:.60} is not supported while a policy learns", "unsupported")
        ignored = {name for name in OF_THE_RUN if fields.get(name) is not None} - self._ignored
        if ignored:
            self._ignored |= ignored
            log.warning("agents' calls set %s, which has no effect: the run decides", ", ".join(sorted(ignored)))
        return call

    def _completion(self, call: _Chat, answer: Answer) -> dict[str, Any]:
        response, said = answer.response, answer.message
        token_ids = response.token_ids.tolist()
        message: dict[str, Any] = {"role": "assistant", "content": said.content}
        if said.calls:
            message["content"] = said.content or None
            message["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)},
                }
                for c in said.calls
            ]
        finished = "tool_calls" if said.calls and response.finish_reason == "stop" else response.finish_reason
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finished, "logprobs": None}
        if call.logprobs:
            tokenizer = self.renderer(()).template.tokenizer
            texts = [str(tokenizer.decode([token])) for token in token_ids]
            pairs = zip(texts, response.logprobs.tolist(), strict=True)
            content = [{"token": t, "logprob": p, "bytes": list(t.encode()), "top_logprobs": []} for t, p in pairs]
            choice["logprobs"] = {"content": content, "refusal": None}
        completion = {
            "id": f"chatcmpl-{response.id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": MODEL,
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(answer.prompt_ids),
                "completion_tokens": len(token_ids),
                "total_tokens": len(answer.prompt_ids) + len(token_ids),
            },
        }
        if call.return_token_ids:
            choice["token_ids"], completion["prompt_token_ids"] = token_ids, answer.prompt_ids
        return completion


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the rollout worker."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _retried(request: Request) -> bool:
    return request.headers.get(RETRIES, "0") != "0"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": error.code}
    return JSONResponse({"error": body}, error.status)


def _loaded(content: str | bytes) -> Any:
    """Parse JSON. Half characters, which no tokenizer accepts, become `?`: clients cut texts in mid-character."""
    return json.loads(json.dumps(json.loads(content), ensure_ascii=False).encode(errors="replace"))


def _messages(said: Sequence[_Message]) -> list[Message]:
    messages: list[Message] = []
    names: dict[str, str] = {}
    for number, message in enumerate(said):
        content = message.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        calls = tuple(_call(call, number) for call in message.tool_calls or ())
        names |= {call.id: call.name for call in calls}
        name = names.get(message.tool_call_id, "")
        messages.append(Message(role, content, name if role == "tool" else "", calls, message.tool_call_id))
    return messages


def _call(call: _Call, number: int) -> ToolCall:
    try:
        arguments = _loaded(call.function.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise RefusedError(f"messages.{number}: arguments of {call.function.name!r} are not a JSON object", "invalid")
    return ToolCall(call.function.name, arguments, call.id)


async def _events(completion: Mapping[str, Any]) -> Any:
    """Yield the stream's events; the whole turn is one piece, as it is known at once."""
    (choice,) = completion["choices"]
    message = dict(choice["message"])
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
    common = {**completion, "object": "chat.completion.chunk"}
    usage = common.pop("usage")
    rest = {key: value for key, value in choice.items() if key not in ("message", "finish_reason")}
    pieces = [
        {**common, "choices": [{**rest, "delta": message, "finish_reason": None}]},
        {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}], "usage": usage},
    ]
    for piece in pieces:
        yield f"data: {json.dumps(piece)}\n\n"
    yield "data: [DONE]\n\n"
