"""`rollout.engine`, and what else says how engines sample: refused before anything starts where it cannot be, or does
nothing; corrected where the sampler computes more coarsely than the learner."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.config.engine import FIXED, FIXED_ON_CPU, OWNED, engine_arguments
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun

GPU = ("cluster=single_gpu",)


def load(tmp_path: Path, *overrides: str) -> ResolvedRun:
    return load_config(["reward=rule", f"run_dir={tmp_path / 'run'}", *overrides], elsewhere=())


def test_the_names_are_vllms() -> None:
    assert {"quantization", "speculative_config", "attention_backend"} < engine_arguments()
    assert {*OWNED, *FIXED, *FIXED_ON_CPU} <= engine_arguments()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.engine.quantisation=fp8"], "rollout.engine.quantisation=fp8: vLLM's engine has no such argument; "
         "did you mean rollout.engine.quantization?"),
        (["rollout.engine.xyzzy=1"], "rollout.engine.xyzzy=1: vLLM's engine has no such argument; the names are"),
        (["rollout.engine.max_num_seqs=8"], "is set by rollout.max_concurrent_samples; use that"),
        (["rollout.engine.logprobs_mode=raw_logprobs"], "cannot be changed: rlkit depends on its own value"),
        (["rollout.engine.block_size=64"], "cannot be changed with cluster.device=cpu"),
        (["rollout.engine.speculative_config=ngram"], "must be a mapping of vLLM's own keys, like"),
        (["rollout.engine.speculative_config={method: ngram}"], "is for GPUs: vLLM 0.32 samples drafts at undefined"),
        (["rollout.engine.speculative_config={method: ngram, rejection_sample_method: synthetic}"],
         "rejection_sample_method must stay standard"),
        ([*GPU, "rollout.engine.speculative_config={method: suffix}", "rollout.min_p=0.1"],
         "rollout.min_p=0.1: is ignored by vLLM's older runner"),
        (["rollout.engine.kv_cache_dtype=fp8", "algorithm.rollout_correction=none"],
         "none ignores that with rollout.engine.kv_cache_dtype=fp8 the sampler's probabilities differ from the "
         "learner's"),
        (["rollout.cache_after_update=keep"], "has no effect with trainer.max_staleness=0: nothing is being sampled"),
        (["environment=guess_number", "environment.new_weights=park"],
         "park has no effect with trainer.max_staleness=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("argument", ["quantization=fp8", "kv_cache_dtype=fp8_e5m2"])
def test_other_precision_is_corrected_by_default(tmp_path: Path, argument: str) -> None:
    section = load(tmp_path, *GPU, f"rollout.engine.{argument}").config.algorithm
    assert (section["rollout_correction"], section["largest_weight"]) == ("truncate", 2.0)


@pytest.mark.parametrize(
    "argument", ["kv_cache_dtype=auto", "max_num_batched_tokens=16384", "block_size=32", "async_scheduling=false"]
)
def test_other_arguments_leave_the_correction_as_it_is(tmp_path: Path, argument: str) -> None:
    run = load(tmp_path, *GPU, f"rollout.engine.{argument}")
    assert run.config.algorithm["rollout_correction"] == "none"
    assert list(run.config.rollout.engine) == [argument.partition("=")[0]]


def test_exact_drafts_need_no_correction(tmp_path: Path) -> None:
    drafts = "{method: ngram, num_speculative_tokens: 3, prompt_lookup_max: 2}"
    run = load(tmp_path, *GPU, f"rollout.engine.speculative_config={drafts}")
    assert run.config.algorithm["rollout_correction"] == "none"
    assert run.config.rollout.engine["speculative_config"]["num_speculative_tokens"] == 3


def test_kept_caches_are_for_weights_in_flight(tmp_path: Path) -> None:
    run = load(tmp_path, "rollout.cache_after_update=keep", "trainer.max_staleness=2")
    assert run.config.rollout.cache_after_update == "keep"
