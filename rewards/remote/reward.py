"""`reward=remote`: a reward that `python -m rlkit.serve reward=...` serves, on this or on another machine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from rewards.base import Reward, RewardConfig, RewardContext, RewardTraits
from rewards.remote.handshake import HandshakeError, describe, describe_once, token_from, url_problem
from rlkit.experience import Group, GroupScores

if TYPE_CHECKING:
    from rewards.remote.client import RewardClient
    from rlkit.experience.wire import Health

log = logging.getLogger(__name__)

BUDGET_SHARE = 0.8
"""Share of a call's deadline after which the client gives up, so that it answers instead of being killed."""
SERVER_TRIES = 2
"""A server tries a request once more if its process fails at it: so many deadlines of its own may pass."""
PAUSE_SECONDS = 0.5
"""Between two looks for a server that is not there yet."""


class RemoteReward(Reward):
    """Sends groups to a reward server and takes its scores.

    What the served reward needs and gives is asked before the run starts. A server that goes away is waited for, with
    back-off, as long as the call's deadline allows; then the samples are invalid, with the reason.
    """

    class Config(RewardConfig):
        """Options of the client."""

        url: str
        """Address of the server: http://HOST:PORT."""
        timeout_seconds: float = Field(default=360.0, gt=0, allow_inf_nan=False)
        """Deadline of one scoring call; after 80 % of it the client gives up. That is time for both tries of a server
        whose own deadline is the default (120 s), and for replacing its process in between."""
        token_env: str | None = None
        """Name of the environment variable that holds the server's token; the token itself is never written down."""
        samples_per_request: int = Field(default=64, ge=1)
        """Whole groups are sent together up to so many samples (fewer if the server takes fewer)."""
        tokens_per_request: int = Field(default=65536, ge=1)
        """And up to so many tokens, each prompt counted once."""
        concurrent_requests: int = Field(default=4, ge=1)
        """Requests that each worker has open at a time."""
        attempts: int = Field(default=20, ge=1)
        """Tries per request, with growing pauses, while the server is away or busy. `timeout_seconds` ends them too."""
        send_logprobs: bool = False
        """Send the sampler's log-probs, for served rewards that look at them (they see NaN otherwise)."""

    def __init__(self, config: Any, context: RewardContext) -> None:
        super().__init__(config, context)
        self._client: RewardClient | None = None
        self._runner: asyncio.Runner | None = None

    @classmethod
    def check(cls, config: Any) -> list[str]:
        """The server answers, speaks this version, and its reward works."""
        problem = url_problem(config.url)
        if problem:
            return [problem]
        try:
            describe_once(config.url, token_from(config.token_env))
        except HandshakeError as error:
            return [str(error)]
        return []

    @classmethod
    def traits(cls, config: Any) -> RewardTraits:
        """What the served reward says; the GPU is its server's. Needs nothing if it cannot be asked."""
        elsewhere = RewardTraits(uses_gpu=False)
        if url_problem(config.url):
            return elsewhere
        try:
            health = describe_once(config.url, token_from(config.token_env))
        except HandshakeError:
            return elsewhere  # `check` reports it
        needs = health.needs
        return replace(
            elsewhere,
            references=needs.references,
            answer=needs.answer,
            columns=tuple(needs.columns),
            process_rewards=health.gives_process_rewards,
        )

    def start(self) -> None:
        """Meet the server. Raises HandshakeError if it is not there within the deadline of a call."""
        from rewards.remote.client import Limits, RewardClient

        config, budget = self.config, BUDGET_SHARE * self.config.timeout_seconds
        token = token_from(config.token_env)
        health = self._meet(token, time.monotonic() + budget)
        if health.trainable:
            log.warning("%s learns in a run of its own; served, it stays as it is and only scores", health.reward)
        longest = SERVER_TRIES * health.call_timeout_seconds
        if budget < longest:
            log.warning(
                "reward.timeout_seconds=%g: this client gives up after %g s, but the server at %s may work on a "
                "request for %g s (%d tries of %g s each); set at least %g here, or start the server with less",
                *(config.timeout_seconds, budget, config.url, longest, SERVER_TRIES, health.call_timeout_seconds),
                longest / BUDGET_SHARE,
            )
        limits = Limits(
            samples_per_request=min(config.samples_per_request, health.max_request_samples),
            tokens_per_request=config.tokens_per_request,
            concurrent_requests=config.concurrent_requests,
            body_bytes=health.max_body_bytes,
            attempts=config.attempts,
            budget_seconds=budget,
        )
        self._client = RewardClient(config.url, token, health.model_version, limits, config.send_logprobs)
        self._runner = asyncio.Runner()  # one event loop for all calls keeps the connections open

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Scores from the server, in order."""
        if self._client is None or self._runner is None:
            raise RuntimeError("start() was not called")
        return self._runner.run(self._client.score(groups)) if groups else []

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None and self._runner is not None:
            self._runner.run(self._client.close())
            self._runner.close()
        self._client = self._runner = None

    def _meet(self, token: str | None, deadline: float) -> Health:
        while True:
            try:
                return describe(self.config.url, token)
            except HandshakeError as error:
                if not error.may_pass or time.monotonic() + PAUSE_SECONDS > deadline:
                    raise
                log.warning("%s; looking again", error)
                time.sleep(PAUSE_SECONDS)
