"""The two ways to run the discriminator in the reward's process: packed transformers, and vLLM's pooling runner.

What a backend has to prove before training: that it scores two canned inputs as a plain forward pass does.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rewards.polar.serialise import MARKER, SEPARATOR, SerialisationError, Serialiser, shared_prefix
from rlkit.experience import UserError

if TYPE_CHECKING:
    import torch

    from rlkit.models.packing import Tree


RELEASED_ARCHITECTURE = "InternLM2ForRewardModel"
"""What config.json of a released POLAR checkpoint names."""


class DiscriminatorError(UserError, ValueError):
    """A model folder that cannot serve as discriminator; the message says why and what to do."""


class Backend(Protocol):
    """Scores token sequences."""

    def score(self, trees: Sequence[Tree]) -> Sequence[float | str]:
        """Raw logits of all sequences of all trees, in order; a reason in the place of one that cannot be scored."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class TransformersBackend:
    """The model in this process; what the samples of a group have in common is computed once."""

    def __init__(self, folder: Path, device: str, dtype: str, threads: int, tokens_per_batch: int) -> None:
        import torch

        from rlkit.models.policy import load_scorer

        torch.set_num_threads(threads)
        self._device = device
        self._tokens_per_batch = tokens_per_batch
        self._scorer: Any = load_scorer(folder, torch_dtype(dtype, device)).to(device).eval()

    def score(self, trees: Sequence[Tree]) -> list[float]:
        import torch

        from rlkit.models.packing import pack, split_by_tokens

        parts = [part for tree in trees for part in cut(tree, self._tokens_per_batch)]
        scores: list[list[float]] = [[] for _ in parts]
        with torch.inference_mode():
            for batch in split_by_tokens([expanded_tokens(part) for part in parts], self._tokens_per_batch):
                values = iter(self._scorer(pack([parts[i] for i in batch]).to(self._device)).tolist())
                for i in batch:
                    scores[i] = [next(values) for _ in parts[i].suffixes]
        return [score for part in scores for score in part]

    def close(self) -> None:
        self._scorer = None
        gc.collect()


class VllmBackend:
    """vLLM's pooling runner in this process; its prefix cache shares what sequences have in common."""

    def __init__(
        self, folder: Path, device: str, dtype: str, max_length: int, memory_gib: float, gpu_memory_utilization: float
    ) -> None:
        # One process, no core binding: the reward shares its cores with the sampler and must die with its actor.
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
        from vllm import LLM

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
        # vLLM passes a one-label classifier through a sigmoid unless told not to.
        outputs = self._llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        return [float(output.outputs.probs[0]) for output in outputs]

    def close(self) -> None:
        self._llm = None
        gc.collect()


def plain_scores(folder: Path, device: str, dtype: str, sequences: Sequence[Sequence[int]]) -> list[float]:
    """The yardstick: transformers' own model class, one unpadded sequence at a time, read at its last token.

    Raises DiscriminatorError if weights are missing.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=torch_dtype(dtype, device),
        attn_implementation="eager",
        trust_remote_code=False,
        output_loading_info=True,
    )
    lost = sorted(info["missing_keys"])
    if lost:
        raise DiscriminatorError(
            f"reward.model_path: {folder} lacks {', '.join(lost[:5])}: they would start at random, and scores would "
            "mean nothing; name a folder with all weights"
        )
    model = model.to(device).eval()
    scores = []
    with torch.inference_mode():
        for ids in sequences:
            hidden = model.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state
            scores.append(float(torch.nn.functional.linear(hidden[0, -1].float(), model.score.weight.float())))
    return scores


def check_folder(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises DiscriminatorError if this is no one-label sequence classifier."""
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
    """The model's config.json. Raises DiscriminatorError if there is none, or no JSON object in it."""
    path = folder / "config.json"
    if not path.is_file():
        raise DiscriminatorError(f"{folder} holds no config.json; name a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DiscriminatorError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise DiscriminatorError(f"{path} holds no JSON object")
    return config


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a model's weights, and not only its configuration and tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def torch_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on CPU; the head is computed in float32 either way."""
    import torch

    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    found: torch.dtype = getattr(torch, dtype)
    return found


def expanded_tokens(tree: Tree) -> int:
    """Tokens of all sequences of a tree, the shared prefix counted for each."""
    return len(tree.prefix) * len(tree.suffixes) + sum(len(suffix) for suffix in tree.suffixes)


def cut(tree: Tree, limit: int) -> list[Tree]:
    """The tree as several with the same prefix, each of at most `limit` expanded tokens (or one sequence)."""
    from rlkit.models.packing import Tree

    parts: list[list[Sequence[int]]] = [[]]
    room = limit
    for suffix in tree.suffixes:
        size = len(tree.prefix) + len(suffix)
        if parts[-1] and size > room:
            parts.append([])
            room = limit
        parts[-1].append(suffix)
        room -= size
    return [Tree(tree.prefix, part) for part in parts]


CANNED = (
    ("What is the capital of China?", "Beijing.", "Beijing."),
    ("What is the capital of China?", "Beijing.", "Shanghai."),
)
"""(prompt, reference, candidate)"""
FP32_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1
"""Largest difference between the backend and a plain forward pass, in fp32 and in bf16 or fp16."""


def canned_inputs(serialiser: Serialiser) -> list[tuple[int, ...]]:
    """Token ids of the canned inputs."""
    return [tuple(serialiser.token_ids(serialiser.text(*canned))) for canned in CANNED]


def scores_of(backend: Backend, sequences: Sequence[tuple[int, ...]]) -> list[float]:
    """The backend's scores of the canned inputs. Raises DiscriminatorError if it refuses one."""
    from rlkit.models.packing import Tree

    prefix = shared_prefix(sequences)
    found: list[float] = []
    for score in backend.score([Tree(prefix, [ids[len(prefix) :] for ids in sequences])]):
        if isinstance(score, str):
            raise DiscriminatorError(f"self-test failed: {score}")
        found.append(score)
    return found


def check_white_space(serialiser: Serialiser, folder: Path) -> None:
    """transformers may replace a folder's saved tokenizer by its model type's, which can lose spaces in silence."""
    expected = ["1", "+", "2", "3", f"4{SEPARATOR}1", "+", "2", f"5{MARKER}"]
    found = serialiser.text("1 + 2\n", "3\n4", "5").split()
    if found != expected:
        raise SerialisationError(f"the tokenizer in {folder} does not keep white space: {found} from {expected}")


def check_scores(found: Sequence[float], expected: Sequence[float], tolerance: float, backend: str) -> None:
    """Raise DiscriminatorError if a backend's scores are not those of a plain forward pass."""
    if not all(math.isfinite(score) for score in (*found, *expected)):
        raise DiscriminatorError(f"the self-test gave non-finite scores: {backend} {found}, transformers {expected}")
    if _close(found, expected, tolerance):
        return
    squashed = [1 / (1 + math.exp(-score)) for score in expected]
    cause = (
        "they are the sigmoid of the raw scores: the activation is on"
        if _close(found, squashed, tolerance)
        else "is this the model that the folder holds, and does the backend support its architecture?"
    )
    raise DiscriminatorError(
        f"self-test failed: {backend} scores the canned inputs {_rounded(found)}, a plain transformers forward pass "
        f"{_rounded(expected)} (tolerance {tolerance:g}): {cause}"
    )


def check_unsquashed(found: Sequence[float], backend: str) -> None:
    """Without weights to compare with: raise DiscriminatorError if the scores cannot be raw logits."""
    if not all(math.isfinite(score) for score in found):
        raise DiscriminatorError(f"self-test failed: {backend} gives the scores {found}")
    if all(0 < score < 1 for score in found):
        raise DiscriminatorError(
            f"self-test failed: {backend} scores the canned inputs {_rounded(found)}, all between 0 and 1: this looks "
            "like a sigmoid of the raw scores, and would hide how bad bad answers are; switch the server's activation "
            "off, or, if these are raw scores, set reward.compare_at_start=true with the weights in reward.model_path"
        )


def _close(found: Sequence[float], expected: Sequence[float], tolerance: float) -> bool:
    return len(found) == len(expected) and all(
        abs(left - right) <= tolerance * max(1.0, abs(right)) for left, right in zip(found, expected, strict=True)
    )


def _rounded(scores: Sequence[float]) -> list[float]:
    return [round(score, 6) for score in scores]
