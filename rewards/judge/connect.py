"""From the configuration to a judge that has been tried."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.base import RewardContext
from rewards.judge.asking import Judge
from rewards.judge.cache import VerdictCache
from rewards.judge.client import Budget, ChatClient, Endpoint
from rewards.judge.modes import Rules
from rewards.judge.probe import JudgeError, ask_once, complaint, probe

if TYPE_CHECKING:
    from rewards.judge.reward import JudgeReward


async def connect(config: JudgeReward.Config, context: RewardContext) -> tuple[Judge, Callable[[], Awaitable[None]]]:
    """The judge, and what closes it."""
    fields = {"temperature": config.temperature, "max_tokens": config.max_answer_tokens, **config.request_fields}
    endpoint = Endpoint(
        base_url=config.base_url,
        model=config.model,
        api_key=os.environ.get(config.api_key_variable) if config.api_key_variable else None,
        fields=fields,
        call_timeout_seconds=config.call_timeout_seconds,
        attempts=config.attempts,
        max_concurrent=config.max_concurrent,
    )
    max_calls, max_tokens = (n and n // config.workers for n in (config.max_calls, config.max_tokens))
    client = ChatClient(endpoint, Budget(max_calls, max_tokens))
    cache = VerdictCache(config.cache_size, None if config.cache_file is None else Path(config.cache_file).expanduser())
    judge = Judge(
        client,
        cache,
        identity=[config.base_url, config.model, fields],
        answer_format=config.answer_format,
        max_reasks=config.max_reasks,
        seed=context.seed,
    )

    async def close() -> None:
        cache.close()
        await client.close()

    return judge, close


async def introduce(judge: Judge, config: JudgeReward.Config, rules: Rules) -> str:
    """Probe the judge as configured; returns a warning, if there is one. Raises JudgeError if it cannot be used."""
    deadline = time.monotonic() + config.timeout_seconds
    who = f"the judge {config.model} at {config.base_url}"
    try:
        if config.probe == "off":
            await ask_once(judge, rules, config.principle, deadline)
            return ""
        shown = config.reference != "never" and not (rules.mode == "pairwise" and rules.against == "reference")
        result = await probe(judge, rules, config.principle, shown, deadline)
    except JudgeError as error:
        raise JudgeError(f"{who} cannot be used: {error}") from error
    wrong = complaint(result, config.max_false_positive_rate)
    if not wrong:
        return ""
    if config.probe == "warn":
        return f"{who}: {wrong}"
    raise JudgeError(
        f"{who} failed the probe: {wrong}; choose another judge, say more in reward.principle, or go on with "
        "reward.probe=warn"
    )
