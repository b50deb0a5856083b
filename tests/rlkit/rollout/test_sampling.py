"""What `rollout` says of sampling, on real vLLM: where a response ends, what it may be, and from which distribution its
log-probs are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray_fixture import ray_session, run  # noqa: F401
from rollout_host import OpenWorker

from rlkit.config.schema import ClusterConfig, RolloutConfig, RunConfig
from rlkit.config.structured import StructuredConfig
from rlkit.data.rendering import load_tokenizer
from rlkit.experience import Group, Message, Prompt, UserError
from rlkit.models.folder import model_folder
from rlkit.rollout.pool import RolloutPool
from rlkit.rollout.requests import GroupRequest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
FOLDER = model_folder("embedded:policy")
TOKENIZER = load_tokenizer(FOLDER)
EOS = TOKENIZER.eos_token_id
MAX_RESPONSE = 40
SIZES: dict[str, Any] = {"max_prompt_tokens": 64, "max_response_tokens": MAX_RESPONSE, "memory_gib": 0.1}
SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 40}, {"enum": ["unknown", {"answer": None}]}]}
"""Without white space, with which a policy that has never seen JSON would fill an object."""


@pytest.fixture(scope="module")
def pool(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:  # noqa: F811
    """One engine, with a tokenizer, for all options."""
    import ray

    config = RunConfig(
        run_dir=Path("unused"),
        cluster=ClusterConfig(threads_per_actor=1),
        rollout=RolloutConfig(structured=StructuredConfig(regex="x"), **SIZES),
        algorithm={},
        reward={},
        data={},
        verifier={},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlkit.rollout.worker.RolloutWorker", OpenWorker)
        pool = RolloutPool(config, str(FOLDER), tmp_path_factory.mktemp("logs"))
        run(pool.start())
        yield pool
    for worker in pool.workers:
        ray.kill(worker)


QUESTION = "Max saves 3 dollars a week for 4 weeks. He spends 4 dollars. How many dollars does Max have now?"


def prompt(columns: dict[str, Any] | None = None) -> Prompt:
    chat = [{"role": "user", "content": QUESTION}]
    ids = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    return Prompt("p", (Message("user", QUESTION),), tuple(ids), columns=columns or {})


def sample(pool: RolloutPool, columns: dict[str, Any] | None = None, samples: int = 12, **options: Any) -> Group:
    async def ask() -> Group:
        await pool.workers[0].sample_by.remote(RolloutConfig(**{**SIZES, **options}))
        request = GroupRequest(id="g", prompt=prompt(columns), samples=samples, seed=7, step=1, greedy=True)
        (group,) = [group async for ref in pool.generate([request]) for group in await ref]
        return group

    return run(ask())


def test_a_stop_text_ends_a_response_with_the_token_that_completes_it(pool: RolloutPool) -> None:
    """Up to there it is the response of the same seed without a stop: the same tokens, whole, and their log-probs."""
    stops = ("en 8", "#### ", "ave")  # `ave` is inside the tokens of saves, have
    free, stopped = sample(pool), sample(pool, stop=stops)
    cut = 0
    for whole, part in zip([*free.samples, free.greedy], [*stopped.samples, stopped.greedy], strict=True):
        assert whole is not None and part is not None
        texts = [TOKENIZER.decode(whole.token_ids[:n]) for n in range(1, len(whole) + 1)]
        ends = [n for n, text in enumerate(texts, start=1) if any(stop in text for stop in stops)]
        length = ends[0] if ends else len(whole)
        assert part.token_ids.tolist() == whole.token_ids[:length].tolist()
        np.testing.assert_allclose(part.logprobs, whole.logprobs[:length], atol=1e-5)
        assert part.finish_reason == ("stop" if ends else whole.finish_reason)
        assert part.text == TOKENIZER.decode(part.token_ids, skip_special_tokens=True)
        cut += length < len(whole)
    assert cut > 4


def test_a_stop_text_in_the_last_token_allowed_is_a_stop(pool: RolloutPool) -> None:
    whole = sample(pool).samples[0]
    last = TOKENIZER.decode(whole.token_ids[:3])
    part = sample(pool, stop=(last,), max_response_tokens=3).samples[0]
    assert (part.token_ids.tolist(), part.finish_reason) == (whole.token_ids[:3].tolist(), "stop")


def test_a_stop_id_ends_a_response_and_is_in_it(pool: RolloutPool) -> None:
    newline = TOKENIZER.encode("\n", add_special_tokens=False)[-1]
    free, stopped = sample(pool), sample(pool, stop=(newline,))
    for whole, part in zip(free.samples, stopped.samples, strict=True):
        length = min([*np.flatnonzero(whole.token_ids == newline) + 1, len(whole)])
        assert part.token_ids.tolist() == whole.token_ids[:length].tolist()
        assert part.finish_reason == "stop"
    assert any(len(part) < len(whole) for whole, part in zip(free.samples, stopped.samples, strict=True))


def reshaped(logits: np.ndarray, seen: np.ndarray, config: RolloutConfig, allowed: np.ndarray) -> np.ndarray:
    """[V] log-probs of the distribution that the options describe; written without a look at vLLM's."""
    logits = np.where(allowed, logits.astype(np.float64), -np.inf)
    factor = np.where(seen, config.repetition_penalty, 1.0)
    logits = np.where(logits > 0, logits / factor, logits * factor) / config.temperature
    logits = np.where(logits < logits.max() + np.log(max(config.min_p, 1e-300)), -np.inf, logits)
    if config.top_k:
        logits = np.where(logits < np.sort(logits)[-config.top_k], -np.inf, logits)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= config.top_p]] = 0
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(probabilities / probabilities.sum()))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"top_k": 3},
        {"top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.02, "repetition_penalty": 0.8, "top_k": 20, "top_p": 0.9},
        {"structured": StructuredConfig(regex="[789][0-9]"), "temperature": 1.3, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_distribution_sampled_from(pool: RolloutPool, options: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    config = RolloutConfig(**{**SIZES, **options})
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    digits = [np.array([TOKENIZER.convert_tokens_to_ids(digit) for digit in text]) for text in ("789", "0123456789")]
    group = sample(pool, **options)
    for each in group.samples:
        ids = torch.tensor([*group.prompt.token_ids, *each.token_ids.tolist()])[None]
        with torch.no_grad():
            rows = model(ids).logits[0, len(group.prompt.token_ids) - 1 :].numpy()
        if config.structured is not None:
            assert re.fullmatch("[789][0-9]", each.text)
        for i, token in enumerate(each.token_ids):
            seen = np.zeros(rows.shape[1], dtype=bool)
            seen[[*group.prompt.token_ids, *each.token_ids[:i]]] = True
            allowed = np.ones(rows.shape[1], dtype=bool)
            if config.structured is not None:
                allowed = np.isin(np.arange(rows.shape[1]), [*digits, np.array([EOS])][i])
            expected = reshaped(rows[i], seen, config, allowed)
            assert each.logprobs[i] == pytest.approx(expected[token], abs=2e-4)


@pytest.mark.parametrize("kind", ["regex", "choices", "json_schema"])
def test_every_response_matches_what_it_must(pool: RolloutPool, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    choices = ("yes", "no", 'say "maybe"\n')
    value = {"regex": r"(first|then) [0-9]{1,3}!", "choices": choices, "json_schema": str(file)}[kind]
    group = sample(pool, structured=StructuredConfig(**{kind: value}))
    assert group.greedy is not None
    whole = [each for each in (*group.samples, group.greedy) if each.finish_reason == "stop"]
    assert len(whole) > 4, [each.text for each in group.samples]
    for each in whole:
        assert each.token_ids[-1] == EOS
        if kind == "regex":
            assert re.fullmatch(str(value), each.text)
        elif kind == "choices":
            assert each.text in choices
        else:
            answer = json.loads(each.text)
            assert answer in ("unknown", {"answer": None}) or 0 <= answer <= 40
    assert len({each.text for each in whole}) > 1


def test_a_column_gives_each_problem_its_own_choices(pool: RolloutPool) -> None:
    own = StructuredConfig(choices="column:options")
    for options in (["red", "green"], ["7", "8", "9"]):
        group = sample(pool, {"options": options}, structured=own)
        assert {each.text for each in group.samples} <= set(options)


def test_a_grammar_that_vllm_cannot_follow_is_named(pool: RolloutPool) -> None:
    with pytest.raises(UserError, match=r"rollout\.structured: vLLM cannot follow .*\(\?<=a\)b"):
        sample(pool, structured=StructuredConfig(regex="(?<=a)b"))
    assert replace(sample(pool), id="h").samples  # the engine goes on
