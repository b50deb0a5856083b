"""Checks whether log-probs of packed batches equal those of plain transformers, at load, on a small copy of the model.

Two prompts with two responses each are run as one packed row, and with each sequence as its own row. Log-probs (scores
for a classifier) and their gradients must equal those of each sequence alone under transformers' own attention.
"""

from __future__ import annotations

import copy
import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlkit.models.attention import PACKED_ATTENTION
from rlkit.models.forward import ModelLoadError, PackedCausalLM, PackedScorer
from rlkit.models.packing import Tree, pack
from rlkit.models.small import small_copies

log = logging.getLogger(__name__)

LIMIT = 1e-3
"""Largest allowed difference of log-probs, and of gradients relative to the largest of their parameter, in fp32."""
ATTENTIONS = (PACKED_ATTENTION, "sdpa", "eager")
"""The last two are transformers' own, which run row by row: eager computes what sdpa lacks (soft caps, sinks)."""
SEEDS = (0, 1)
"""Experts with equal scores may be chosen either way: if results differ with one seed, the other is tried."""
GAINS = (1.5, 0.7, 3.0, 0.2)
"""Standard deviations of random weights x sqrt(their inputs), tried until log-probs depend on the context."""
LEAST_EFFECT = 0.05
"""Smallest change of log-probs under another prompt: with less, the test would not detect leaks between sequences."""
# In the first tree the prompt attends once for both responses, in the second once per response
# (packing.LEAST_SHARED_PREFIX).
TREES = (
    Tree(
        (11, 23, 35, 47, 59, 20, 32, 43, 55, 16, 28, 40, 52, 13, 25, 37, 49, 61),
        ((44, 56, 17, 29, 41, 53, 14, 26, 38), (50, 62, 13, 25)),
    ),
    Tree((61, 12, 24, 36), ((48, 60, 21, 33, 45, 57), (18, 30, 42, 54, 15, 27, 39, 51, 63, 22, 34, 46))),
)


@dataclass(frozen=True)
class Trial:
    attention: str
    difference: float
    """The larger of the differences of log-probs and of relative gradients; infinite after an error."""
    error: str = ""

    @property
    def exact(self) -> bool:
        return self.difference <= LIMIT

    def __str__(self) -> str:
        way = "packed" if self.attention == PACKED_ATTENTION else f"row by row ({self.attention})"
        return f"{way}: {self.error or f'they differ by {self.difference:.2g}'}"


def choose_attention(config: Any, auto: Any = AutoModelForCausalLM, *, trust_remote_code: bool = False) -> str:
    """Return an attention under which the model is exact: packed, or transformers' own, row by row.

    Raise ModelLoadError with the model type and the differences if there is none.
    """
    key = (auto, config.to_json_string(use_diff=False))
    if key in _chosen:
        return _chosen[key]
    with _apart():
        trials = try_attentions(config, auto, trust_remote_code=trust_remote_code)
    if not trials[-1].exact:
        raise ModelLoadError(
            f"model type {config.model_type} is refused: it would be trained on wrong numbers. Log-probs and gradients "
            "of packed batches must equal those of single sequences under transformers, and on a small copy of the "
            f"model they do not ({'; '.join(map(str, trials))}); docs/models.md lists the models that work"
        )
    if len(trials) > 1:
        log.warning("%s runs row by row, which is slower (%s)", config.model_type, trials[0])
    _chosen[key] = trials[-1].attention
    return trials[-1].attention


_chosen: dict[tuple[Any, str], str] = {}
"""Results of this process: policy and reference share a configuration."""


def try_attentions(config: Any, auto: Any = AutoModelForCausalLM, *, trust_remote_code: bool = False) -> list[Trial]:
    """Return one trial per attention, until one is exact. Raise ModelLoadError for a model that cannot be tried."""
    classifier = auto is AutoModelForSequenceClassification

    def build(small: Any, attention: str = "eager") -> nn.Module:
        small = copy.deepcopy(small)  # because transformers modifies it
        if classifier:  # a score is read at the last token that is not padding
            small.pad_token_id = small.get_text_config().pad_token_id = None
            small.num_labels = 1
        model: nn.Module = auto.from_config(
            small,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
        return model.eval()

    errors: list[str] = []
    for small in small_copies(config, build):
        try:
            test = _Test.of(small, build, classifier, SEEDS[0])
        except Exception as error:  # whatever a model's code raises; the next copy is closer to the original
            errors.append(_text(error))
            continue
        trials: list[Trial] = []
        for attention in ATTENTIONS:
            trial = test.trial(attention)
            if not trial.exact and not trial.error:
                again = _Test.of(small, build, classifier, SEEDS[1]).trial(attention)
                trial = min(trial, again, key=lambda trial: trial.difference)
            trials.append(trial)
            if trial.exact:
                break
        return trials
    raise ModelLoadError(
        f"model type {config.model_type} is refused: no small copy of it runs under transformers, so its log-probs "
        f"cannot be checked ({'; '.join(dict.fromkeys(errors))})"
    )


@dataclass(frozen=True)
class _Numbers:
    values: Tensor
    """[R] log-probs, or [N] scores."""
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, values: Tensor) -> _Numbers:
        (values * torch.linspace(-1, 2, len(values))).sum().backward()
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        return cls(values.detach(), gradients)

    def difference(self, other: _Numbers) -> float:
        largest = max(float(gradient.abs().max()) for gradient in self.gradients.values() if gradient.numel())
        differences = [float((self.values - other.values).abs().max())]
        for name, gradient in self.gradients.items():
            if gradient.numel():
                scale = float(gradient.abs().max()) + 1e-3 * largest
                differences.append(float((gradient - other.gradients[name]).abs().max()) / scale)
        worst = max(differences)
        return worst if all(value == value for value in differences) else float("inf")


@dataclass(frozen=True)
class _Test:
    build: Any
    small: Any
    trees: list[Tree]
    classifier: bool
    seed: int
    gain: float
    expected: _Numbers

    @classmethod
    def of(cls, small: Any, build: Any, classifier: bool, seed: int) -> _Test:
        """Create a test. Raise what the model's own forward pass raises."""
        trees = [_within(tree, small.get_text_config().vocab_size) for tree in TREES]
        others = [Tree(tuple(reversed(tree.prefix)), tree.suffixes) for tree in trees]
        for gain in GAINS:
            model = _random(build, small, "eager", seed, gain)
            values = _plain(model, trees, classifier)
            with torch.no_grad():
                effect = float((_plain(model, others, classifier) - values).abs().max())
            if LEAST_EFFECT < effect < float("inf"):
                return cls(build, small, trees, classifier, seed, gain, _Numbers.of(model, values))
        raise ValueError("with random weights its log-probs do not depend on the prompt, or are not finite")

    def trial(self, attention: str) -> Trial:
        try:
            model = _random(self.build, self.small, attention, self.seed, self.gain)
            packed = pack(self.trees)
            values = PackedScorer(model)(packed) if self.classifier else PackedCausalLM(model)(packed)[0]
            return Trial(attention, self.expected.difference(_Numbers.of(model, values)))
        except Exception as error:  # whatever a model's code raises when it is run in a way it was not meant for
            return Trial(attention, float("inf"), _text(error))


@contextmanager
def _apart() -> Iterator[None]:
    """Isolate the test from the caller's context: the random state is restored, and gradients are always recorded.

    Under ZeRO 3 a hook on all modules partitions what is loaded; the small copy must stay whole.
    """
    hooks = torch.nn.modules.module._global_parameter_registration_hooks
    saved = dict(hooks)
    hooks.clear()
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        hooks.update(saved)
        _give_back()


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps up to 250 MB, which the process will not need in small blocks
    again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _random(build: Any, small: Any, attention: str, seed: int, gain: float) -> Any:
    """Build a model with the same random weights for each attention, large enough for differences to show."""
    torch.manual_seed(seed)
    model = build(small, attention)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in embeddings:
                parameter.normal_(0, 1)
            elif parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(0, gain / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _plain(model: Any, trees: Sequence[Tree], classifier: bool) -> Tensor:
    """Log-probs [R] of the suffixes, or scores [N], computed one sequence at a time."""
    values = []
    for tree in trees:
        for suffix in tree.suffixes:
            ids = torch.tensor([*tree.prefix, *suffix])
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            if classifier:
                values.append(logits.reshape(-1))
            else:
                start = len(tree.prefix)
                logprobs = torch.log_softmax(logits[start - 1 : -1], dim=-1)
                values.append(logprobs.gather(1, ids[start:, None])[:, 0])
    return torch.cat(values)


def _within(tree: Tree, vocabulary: int) -> Tree:
    return Tree([i % vocabulary for i in tree.prefix], [[i % vocabulary for i in suffix] for suffix in tree.suffixes])


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
