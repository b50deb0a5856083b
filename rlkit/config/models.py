"""Checks of the policy's folder: what its files say before anything is loaded."""

from __future__ import annotations

from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.plan import longest_response
from rlkit.config.schema import ClusterConfig, EvaluationConfig, ModelConfig, RolloutConfig
from rlkit.models.folder import ModelFolderError, ModelShape, model_folder
from rlkit.models.usable import known_run, refusals


def model_is_usable(
    model_shape: ModelShape | ModelFolderError,
    model: ModelConfig,
    cluster: ClusterConfig,
    rollout: RolloutConfig,
    evaluation: EvaluationConfig,
) -> Issues:
    if isinstance(model_shape, ModelFolderError):
        yield ConfigIssue("model.path", str(model_shape))
        return
    folder = model_folder(model.path)
    longest = rollout.max_prompt_tokens + longest_response(rollout, evaluation)
    reasons = refusals(
        folder,
        device=cluster.device,
        longest=longest,
        chat_template=model.chat_template is not None,
        trust_remote_code=model.trust_remote_code,
    )
    for refusal in reasons:
        yield ConfigIssue("model.path", refusal)
    if known_run(folder) == "rows":
        yield ConfigIssue(
            "model.path",
            "its layers carry state from token to token, or its attention is its own: the learner runs each sequence "
            "as a row of its own, which is exact but slower (docs/models.md)",
            warning=True,
        )


def model_is_long_enough(
    model_shape: ModelShape | ModelFolderError, rollout: RolloutConfig, evaluation: EvaluationConfig
) -> Issues:
    if isinstance(model_shape, ModelFolderError) or model_shape.max_positions is None:
        return
    responses = longest_response(rollout, evaluation)
    total = rollout.max_prompt_tokens + responses
    if total > model_shape.max_positions:
        section = "rollout" if responses == rollout.max_response_tokens else "evaluation"
        yield ConfigIssue(
            f"{section}.max_response_tokens",
            f"{rollout.max_prompt_tokens} prompt + {responses} response tokens are {total}, but the "
            f"model has {model_shape.max_positions} positions; lower rollout.max_prompt_tokens or this",
        )


def cache_holds_a_sequence(
    model_shape: ModelShape | ModelFolderError,
    rollout: RolloutConfig,
    evaluation: EvaluationConfig,
    cluster: ClusterConfig,
) -> Issues:
    """On CPU the key-value cache has a fixed size; vLLM would refuse after loading the model."""
    if isinstance(model_shape, ModelFolderError) or cluster.device != "cpu":
        return
    tokens = rollout.max_prompt_tokens + longest_response(rollout, evaluation)
    needed = tokens * model_shape.kv_bytes_per_token(4 if rollout.dtype in ("auto", "float32") else 2) / 2**30
    if needed > rollout.memory_gib:
        yield ConfigIssue("rollout.memory_gib", f"one sequence of {tokens} tokens needs {needed:.2f} GiB of cache")


def stop_tokens_exist(model_shape: ModelShape | ModelFolderError, rollout: RolloutConfig) -> Issues:
    if isinstance(model_shape, ModelFolderError):
        return
    for stop in rollout.stop_ids:
        if not 0 <= stop < model_shape.vocabulary:
            yield ConfigIssue(
                "rollout.stop", f"token {stop} is not in the model's vocabulary of {model_shape.vocabulary}"
            )


MODELS = (model_is_usable, model_is_long_enough, cache_holds_a_sequence, stop_tokens_exist)
