"""Checks a POLAR discriminator's folder, runs it in the reward's process, and has the self-test of every backend."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rewards.polar.serialise import MARKER, SEPARATOR, SerialisationError, Serialiser
from rlkit.experience import UserError

if TYPE_CHECKING:
    from rlkit.models.packing import Tree


RELEASED_ARCHITECTURE = "InternLM2ForRewardModel"
"""The architecture in a released POLAR checkpoint."""


class DiscriminatorError(UserError, ValueError): ...


class Backend(Protocol):
    def score(self, trees: Sequence[Tree]) -> Sequence[float | str]:
        """Return the raw logits of all sequences in order; instead of a logit, the reason if one cannot be scored."""
        ...

    def close(self) -> None: ...


class VllmBackend:
    """vLLM's pooling runner in this process, with its prefix cache."""

    def __init__(
        self, folder: Path, device: str, dtype: str, max_length: int, memory_gib: float, gpu_memory_utilization: float
    ) -> None:
        # One process, without core binding: the reward shares its cores with the sampler and must die with its actor.
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
        import torch
        from vllm import LLM

        torch.cpu._init_amx()  # as in rlkit/rollout/engine.py
        on_gpu = device != "cpu"
        self._llm: Any = LLM(
            model=str(folder),
            runner="pooling",
            dtype=dtype if dtype != "auto" else ("bfloat16" if on_gpu else "float32"),
            max_model_len=max_length,
            enable_prefix_caching=True,
            enforce_eager=True,
            disable_log_stats=True,
            trust_remote_code=False,
            **(
                {"gpu_memory_utilization": gpu_memory_utilization}
                if on_gpu
                else {"distributed_executor_backend": "uni", "kv_cache_memory_bytes": int(memory_gib * 2**30)}
            ),
        )

    def score(self, trees: Sequence[Tree]) -> list[float]:
        from vllm import PoolingParams

        prompts = [{"prompt_token_ids": [*tree.prefix, *suffix]} for tree in trees for suffix in tree.suffixes]
        # By default vLLM applies a sigmoid to the score of a one-label classifier.
        outputs = self._llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        return [float(output.outputs.probs[0]) for output in outputs]

    def close(self) -> None:
        self._llm = None
        gc.collect()


def plain_scores(folder: Path, device: str, dtype: str, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Score by a plain forward pass of transformers, one unpadded sequence at a time, read at its last token.

    Raise DiscriminatorError if weights are missing.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlkit.models.policy import resolve_dtype

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=resolve_dtype(dtype, device),
        attn_implementation="eager",
        trust_remote_code=False,
        output_loading_info=True,
    )
    lost = sorted(info["missing_keys"])
    if lost:
        raise DiscriminatorError(
            f"reward.model_path: {folder} lacks {', '.join(lost[:5])}: they would be random, and the scores "
            "meaningless; name a folder with all weights"
        )
    model = model.to(device).eval()
    scores = []
    with torch.inference_mode():
        for ids in sequences:
            hidden = model.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state
            scores.append(float(torch.nn.functional.linear(hidden[0, -1].float(), model.score.weight.float())))
    return scores


def check_folder(folder: Path) -> dict[str, Any]:
    """Return config.json. Raise DiscriminatorError unless it is a one-label sequence classifier."""
    try:
        config = read_config(folder)
    except DiscriminatorError as error:
        raise DiscriminatorError(f"reward.model_path: {error}") from error
    architectures = config.get("architectures") or ["(none)"]
    if architectures[0] == RELEASED_ARCHITECTURE:
        raise DiscriminatorError(
            f"reward.model_path: {folder} holds a {RELEASED_ARCHITECTURE}, which is Python code of its own; convert it "
            f"once, exactly, to a model that transformers and vLLM know: python -m rewards.polar.convert {folder} "
            f"{folder}-llama, then reward.model_path={folder}-llama"
        )
    if not architectures[0].endswith("ForSequenceClassification"):
        raise DiscriminatorError(
            f"reward.model_path: {folder} holds a {architectures[0]}; a discriminator is a "
            "`...ForSequenceClassification` with one label (a causal language model has no trained head)"
        )
    labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    if labels != 1:
        raise DiscriminatorError(f"reward.model_path: {folder} has {labels} labels; a discriminator has one")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raise DiscriminatorError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise DiscriminatorError(f"{folder} holds no config.json; name a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DiscriminatorError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise DiscriminatorError(f"{path} holds no JSON object")
    return config


def has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


CANNED = (
    ("What is the capital of China?", "Beijing.", "Beijing."),
    ("What is the capital of China?", "Beijing.", "Shanghai."),
)
"""(prompt, reference, candidate)"""
FP32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1
"""Largest difference from a plain forward pass, in fp32 and in bf16 or fp16 (relative for scores above 1)."""


def canned_inputs(serialiser: Serialiser) -> list[tuple[int, ...]]:
    return [tuple(serialiser.token_ids(serialiser.text(*canned))) for canned in CANNED]


def scores_of(backend: Backend, sequences: Sequence[tuple[int, ...]]) -> list[float]:
    """Score the canned inputs. Raise DiscriminatorError if the backend refuses one of them."""
    from rlkit.models.packing import Tree

    scores: list[float] = []
    for score in backend.score([Tree.of(sequences)]):
        if isinstance(score, str):
            raise DiscriminatorError(f"self-test failed: {score}")
        scores.append(score)
    return scores


def check_white_space(serialiser: Serialiser, folder: Path) -> None:
    """Check that transformers did not silently replace the saved tokenizer by one that loses white space."""
    expected = ["1", "+", "2", "3", f"4{SEPARATOR}1", "+", "2", f"5{MARKER}"]
    words = serialiser.text("1 + 2\n", "3\n4", "5").split()
    if words != expected:
        raise SerialisationError(f"the tokenizer in {folder} does not keep white space: {words} from {expected}")


def check_scores(scores: Sequence[float], expected: Sequence[float], tolerance: float, backend: str) -> None:
    """Raise DiscriminatorError if the scores differ from those of a plain forward pass."""
    if not all(math.isfinite(score) for score in (*scores, *expected)):
        raise DiscriminatorError(f"the self-test gave non-finite scores: {backend} {scores}, transformers {expected}")
    if _close(scores, expected, tolerance):
        return
    squashed = [1 / (1 + math.exp(-score)) for score in expected]
    cause = (
        "they are the sigmoid of the raw scores: the activation is on"
        if _close(scores, squashed, tolerance)
        else "is this the model that the folder holds, and does the backend support its architecture?"
    )
    raise DiscriminatorError(
        f"self-test failed: {backend} scores the canned inputs {_rounded(scores)}, a plain transformers forward pass "
        f"{_rounded(expected)} (tolerance {tolerance:g}): {cause}"
    )


def check_unsquashed(scores: Sequence[float], backend: str) -> None:
    """Raise DiscriminatorError if the scores cannot be raw logits; for use without weights to compare with."""
    if not all(math.isfinite(score) for score in scores):
        raise DiscriminatorError(f"self-test failed: {backend} gives the scores {scores}")
    if all(0 < score < 1 for score in scores):
        raise DiscriminatorError(
            f"self-test failed: {backend} scores the canned inputs {_rounded(scores)}, all between 0 and 1: this looks "
            "like a sigmoid of the raw scores, and would hide how bad bad answers are; switch the server's activation "
            "off, or, if these are raw scores, set reward.compare_at_start=true with the weights in reward.model_path"
        )


def _close(scores: Sequence[float], expected: Sequence[float], tolerance: float) -> bool:
    return len(scores) == len(expected) and all(
        abs(left - right) <= tolerance * max(1.0, abs(right)) for left, right in zip(scores, expected, strict=True)
    )


def _rounded(scores: Sequence[float]) -> list[float]:
    return [round(score, 6) for score in scores]
