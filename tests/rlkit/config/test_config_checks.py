"""Parts that do not fit together: each combination is refused, or warned about, with its remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from algorithms.base import AlgorithmConfig, AlgorithmNeeds
from rewards.implicit_prm.reward import ImplicitPRM
from rlkit.config.checks import CHECKS, ConfigIssue, run_checks
from rlkit.config.parts import Part, import_part
from rlkit.config.schema import (
    ClusterConfig,
    CriticConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    TrainerConfig,
)
from rlkit.config.structured import StructuredConfig
from rlkit.data.base import DataConfig
from rlkit.experience.filters import BufferConfig
from rlkit.models.folder import ModelFolderError, ModelShape, check_model_folder

SHAPE = ModelShape(
    parameters=1000, layers=2, kv_heads=4, head_dim=32, vocabulary=100, max_positions=1024, hidden=128, heads=4,
    intermediate=256, largest=12_800, tied=True,
)  # fmt: skip


@dataclass
class SomeAlgorithm:
    """What the checks look at of an algorithm."""

    samples: int = 8
    minimum: int = 1
    layout: Any = "any"
    critic: bool = False
    config: AlgorithmConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = AlgorithmConfig(samples_per_prompt=self.samples)

    def needs(self) -> AlgorithmNeeds:
        return AlgorithmNeeds(critic=self.critic, min_samples_per_prompt=self.minimum, layout=self.layout)


def sections(**changes: Any) -> dict[str, Any]:
    """Valid sections, with some of them replaced."""
    valid = {
        "algorithm": SomeAlgorithm(),
        "trainer": TrainerConfig(),
        "rollout": RolloutConfig(max_prompt_tokens=64, max_response_tokens=64),
        "evaluation": EvaluationConfig(),
        "learner": LearnerConfig(),
        "critic": CriticConfig(),
        "buffer": BufferConfig(),
        "cluster": ClusterConfig(),
        "model_shape": SHAPE,
    }
    return valid | changes


def with_critic(**options: Any) -> dict[str, Any]:
    """Sections of an algorithm that has a critic."""
    return {"algorithm": SomeAlgorithm(critic=True), "critic": CriticConfig(**options)}


def test_valid_sections_pass() -> None:
    assert run_checks(sections()) == []
    assert run_checks(sections(**with_critic())) == []
    # ranks share the samples of a group: as DAPO on 64 ranks, whose 16 mini-batches of 32 groups are 256 samples
    dapo = {"trainer": TrainerConfig(prompts_per_step=512), "learner": LearnerConfig(minibatches_per_step=16, ranks=64)}
    assert [issue for issue in run_checks(sections(**dapo)) if not issue.warning] == []


def test_a_check_whose_section_is_invalid_is_left_out() -> None:
    broken = sections(algorithm=SomeAlgorithm(samples=1, minimum=2))
    assert [issue.where for issue in run_checks(broken)] == ["algorithm.samples_per_prompt"]
    del broken["algorithm"]
    assert run_checks(broken) == []


def test_checks_only_name_known_sections() -> None:
    import inspect

    known = {*sections(), "reward", "data", "verifier", "sets", "diagnostics", "run_dir", "resume", "model", "tracking"}
    known |= {"environment", "typed", "here", "dry_run", "new_folder"}
    for check in CHECKS:
        assert set(inspect.signature(check).parameters) <= known, check.__name__


@pytest.mark.parametrize(
    ("changes", "key", "text"),
    [
        ({"algorithm": SomeAlgorithm(samples=1, minimum=2)}, "algorithm.samples_per_prompt", "needs at least 2"),
        ({"trainer": TrainerConfig(prompts_per_step=33), "learner": LearnerConfig(minibatches_per_step=4)},
         "learner.minibatches_per_step", "3 would fit"),
        ({"trainer": TrainerConfig(prompts_per_step=4), "learner": LearnerConfig(minibatches_per_step=4, ranks=9)},
         "learner.ranks", "a mini-batch has 8 samples ("),
        ({"trainer": TrainerConfig(prompts_per_step=4), "learner": LearnerConfig(minibatches_per_step=4, ranks=2),
          "algorithm": SomeAlgorithm(layout="full_group")},
         "learner.ranks", "a mini-batch has 1 groups ("),
        ({"learner": LearnerConfig(tokens_per_microbatch=100)}, "learner.tokens_per_microbatch", "set at least 128"),
        ({"algorithm": SomeAlgorithm(layout="pairs"), "learner": LearnerConfig(tokens_per_microbatch=191)},
         "learner.tokens_per_microbatch", "set at least 192"),
        ({"algorithm": SomeAlgorithm(layout="full_group"), "learner": LearnerConfig(tokens_per_microbatch=575)},
         "learner.tokens_per_microbatch", "set at least 576"),
        ({"buffer": BufferConfig(min_group_reward=0.9, max_group_reward=0.1)},
         "buffer.min_group_reward", "every group would be rejected"),
        ({"buffer": BufferConfig(drop_equal_rewards=True), "algorithm": SomeAlgorithm(samples=1)},
         "buffer.drop_equal_rewards", "rejects every group"),
        ({"rollout": RolloutConfig(oversample=1.5)}, "rollout.oversample", "no filter rejects groups"),
        ({"learner": LearnerConfig(warmup_steps=100)}, "learner.warmup_steps", "100 optimizer steps"),
        ({"learner": LearnerConfig(min_learning_rate_ratio=0.1)}, "learner.min_learning_rate_ratio", "no effect"),
        ({"rollout": RolloutConfig(tensor_parallel_size=2)}, "rollout.tensor_parallel_size", "must be 1"),
        ({"rollout": RolloutConfig(dtype="float16")}, "rollout.dtype", "use float32"),
        ({"learner": LearnerConfig(dtype="bfloat16")}, "learner.dtype", "use float32"),
        ({"rollout": RolloutConfig(gpu_memory_utilization=0.9)}, "rollout.gpu_memory_utilization", "no effect"),
        ({"cluster": ClusterConfig(device="cuda"), "rollout": RolloutConfig(memory_gib=3),
          "learner": LearnerConfig(zero_stage=1)},
         "rollout.memory_gib", "no effect"),
        ({"cluster": ClusterConfig(device="cuda")}, "learner.zero_stage", "fp32 master weights"),
        ({"critic": CriticConfig(learning_rate=1e-3)}, "critic.learning_rate", "has no critic"),
        (with_critic(minibatches_per_step=5), "critic.minibatches_per_step", "4 would fit"),
        (with_critic(minibatches_per_step=16, ranks=17), "critic.ranks", "less than one for each of 17 ranks"),
        (with_critic(path="/not/there"), "critic.path", "no such folder"),
        (with_critic(policy_waits_steps=100), "critic.policy_waits_steps", "would never learn"),
        (with_critic(warmup_steps=100), "critic.warmup_steps", "100 optimizer steps"),
        (with_critic(tokens_per_microbatch=100), "critic.tokens_per_microbatch", "set at least 128"),
        (with_critic(logit_elements_per_chunk=5), "critic.logit_elements_per_chunk", "not logits"),
        (with_critic(dtype="bfloat16"), "critic.dtype", "use float32"),
        ({**with_critic(), "cluster": ClusterConfig(device="cuda"), "learner": LearnerConfig(zero_stage=1)},
         "critic.zero_stage", "fp32 master weights"),
        ({"cluster": ClusterConfig(address="auto", object_store_gib=3)}, "cluster.object_store_gib", "no effect"),
        ({"rollout": RolloutConfig(max_prompt_tokens=1000)}, "rollout.max_response_tokens", "has 1024 positions"),
        ({"rollout": RolloutConfig(memory_gib=0.0001)}, "rollout.memory_gib", "of cache"),
        ({"model_shape": ModelFolderError("gone"), "model": ModelConfig()}, "model.path", "gone"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], key: str, text: str) -> None:
    refusals = [issue for issue in run_checks(sections(**changes)) if not issue.warning]
    assert [issue.where for issue in refusals] == [key]
    assert text in refusals[0].message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rollout": RolloutConfig(top_p=0.9)}, "rollout.top_p"),
        ({"rollout": RolloutConfig(top_k=5)}, "rollout.top_k"),
        ({"rollout": RolloutConfig(min_p=0.1)}, "rollout.min_p"),
        ({"rollout": RolloutConfig(repetition_penalty=1.1)}, "rollout.repetition_penalty"),
        ({"rollout": RolloutConfig(structured=StructuredConfig(regex="[0-9]+"))}, "rollout.structured.regex"),
        ({"rollout": RolloutConfig(dtype="bfloat16")}, "rollout.dtype"),
        ({"cluster": ClusterConfig(device="cuda"), "learner": LearnerConfig(dtype="float32")}, "rollout.dtype"),
        (
            {"trainer": TrainerConfig(save_every_steps=101), "typed": {"trainer.save_every_steps"}},
            "trainer.save_every_steps",
        ),
        (
            {"trainer": TrainerConfig(evaluate_every_steps=101), "typed": {"trainer.evaluate_every_steps"}},
            "trainer.evaluate_every_steps",
        ),
        ({"learner": LearnerConfig(learning_rate=0.02)}, "learner.learning_rate"),
        ({"trainer": TrainerConfig(prompts_per_step=8193)}, "trainer.prompts_per_step"),
        ({"trainer": TrainerConfig(best_metric="my/own")}, "trainer.best_metric"),
    ],
)
def test_what_is_doubtful_is_warned_about(changes: dict[str, Any], key: str) -> None:
    issues = run_checks(sections(**changes))
    assert [(issue.where, issue.warning) for issue in issues] == [(key, True)]


@pytest.mark.parametrize(
    ("options", "trainer", "said"),
    [
        ({"top_k": 5}, {}, True),
        ({"top_p": 0.9}, {}, False),  # at most ln(1 / 0.9) = 0.105
        ({"top_p": 0.8}, {}, True),
        ({"top_p": 0.8}, {"max_mismatch": 0.3}, False),
        ({"repetition_penalty": 1.1}, {"max_mismatch": None}, False),
        ({"min_p": 0.1}, {"max_staleness": 1}, False),  # the limit does not count then
    ],
)
def test_sampling_that_the_mismatch_limit_may_end_says_so(
    options: dict[str, Any], trainer: dict[str, Any], said: bool
) -> None:
    issues = run_checks(sections(rollout=RolloutConfig(**options), trainer=TrainerConfig(**trainer)))
    (issue,) = [issue for issue in issues if issue.where.startswith("rollout.")]
    assert ("trainer.max_mismatch=null turns that off" in issue.message) is said


def test_surplus_groups_are_for_rounds_that_a_filter_thins() -> None:
    filtered = {"rollout": RolloutConfig(oversample=1.5), "buffer": BufferConfig(drop_equal_rewards=True)}
    assert run_checks(sections(**filtered)) == []
    issues = run_checks(sections(**filtered, trainer=TrainerConfig(max_staleness=1)))
    (message,) = [issue.message for issue in issues if issue.where == "rollout.oversample"]
    assert "is for trainer.max_staleness=0" in message


def test_a_short_run_warns_of_no_interval_that_a_preset_sets() -> None:
    preset = TrainerConfig(total_steps=2, evaluate_every_steps=15)
    assert run_checks({"trainer": preset, "typed": {"trainer.total_steps"}}) == []


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints"])
def test_a_folder_with_a_run_is_refused(tmp_path: Path, name: str) -> None:
    assert run_checks({"run_dir": tmp_path, "resume": "never"}) == []
    (tmp_path / name).touch()
    (issue,) = run_checks({"run_dir": tmp_path, "resume": "never"})
    assert run_checks({"run_dir": tmp_path, "resume": "auto"}) == []
    assert isinstance(issue, ConfigIssue)
    assert name in issue.message


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.touch()
    (issue,) = run_checks({"run_dir": file, "resume": "never"})
    assert "is a file" in issue.message


def test_a_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (issue,) = run_checks({"run_dir": tmp_path / "file" / "run", "resume": "never"})
    assert "cannot be created" in issue.message


def test_model_shape_comes_from_headers_alone(bare_model: Path) -> None:
    shape = check_model_folder(str(bare_model))
    assert shape.parameters == 12_800
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.max_positions) == (2, 4, 32, 1024)
    assert shape.kv_bytes_per_token(4) == 2 * 2 * 4 * 32 * 4


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("config.json", None, "no config.json"),
        ("tokenizer.json", None, "no tokenizer"),
        ("config.json", b"{", "does not describe"),
        ("config.json", b'{"model_type": "llama"}', "does not describe"),
        ("model.safetensors", b"\xff\xff\xff\x00\x00\x00\x00\x00{}", "truncated"),
        ("model.safetensors", b"abc", "truncated"),
    ],
)
def test_a_damaged_model_folder_is_refused(bare_model: Path, file: str, content: bytes | None, text: str) -> None:
    if content is None:
        (bare_model / file).unlink()
    else:
        (bare_model / file).write_bytes(content)
    with pytest.raises(ModelFolderError, match=text):
        check_model_folder(str(bare_model))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model_path": "/not/there"}, "reward.model_path: no such folder"),
        ({"reference_path": "/not/there"}, "reward.reference_path: no such folder"),
        (
            {"outcome": {"_target_": "rewards.verifiers.math.MathRewerd"}},
            "did you mean rewards.verifiers.math.MathReward",
        ),
        ({"outcome": {"_target_": "rewards.verifiers.math.MathReward", "processes": 0}}, "reward.outcome.processes"),
        ({"outcome": {"processes": 1}}, "reward.outcome._target_: must be the dotted path"),
    ],
)
def test_an_implicit_prm_that_cannot_be_made_is_refused(options: dict[str, Any], text: str) -> None:
    assert ImplicitPRM.check(ImplicitPRM.Config()) == []
    (message,) = ImplicitPRM.check(ImplicitPRM.Config(**options))
    assert text in message


@dataclass
class SomeData:
    """A data source, as far as the checks look at it."""

    columns: frozenset[str] = frozenset({"answer"})
    config: DataConfig = field(default_factory=DataConfig)

    def provides(self) -> frozenset[str]:
        return self.columns

    def check(self) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("rewards.verifiers.math.MathReward", {}, None),
        ("rewards.verifiers.terms.GroupLength", {}, "compares 2 responses to a prompt; a held-out prompt has 1 ("),
        ("rewards.implicit_prm.reward.ImplicitPRM", {}, "learns during the run"),
        ("rewards.verifiers.instructions.Instructions", {}, "needs instruction_id_list"),
        ("rewards.verifiers.match.RegexMatch", {"pattern_column": "pattern"}, "needs pattern"),
        ("rewards.polar.reward.PolarReward", {}, "needs references"),
        ("rewards.preference.reward.PreferenceReward", {"model_path": "embedded:policy"}, "verifier.model_path: "),
    ],
)
def test_a_verifier_judges_one_response_with_what_the_data_give(
    target: str, options: dict[str, Any], words: str | None
) -> None:
    cls = import_part("verifier", target)

    some = {"data": SomeData(), "evaluation": EvaluationConfig()}
    issues = run_checks({"verifier": Part(cls, cls.Config(**options)), **some})

    if words is None:
        assert issues == []
    else:
        assert all(issue.where == "verifier" and not issue.warning for issue in issues)
        assert any(words in issue.message for issue in issues)
