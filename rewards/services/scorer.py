"""Computes log-probs, head scores, hidden states and embeddings of token sequences under a frozen model.

A reward built on it:

    class Likelihood(Reward):
        class Config(RewardConfig):
            model_path: str = "embedded:policy"

        def start(self):
            context = self.context
            self.scorer = Scorer.load(self.config.model_path, device=context.device, threads=context.threads)

        def score(self, groups):
            logprobs = iter(self.scorer.logprobs([group_tree(group) for group in groups]))
            values = [[float(next(logprobs).mean()) for _ in group.samples] for group in groups]
            return [GroupScores(tuple(map(Score, of_group))) for of_group in values]

Sequences come as trees: shared prefixes are computed once, and nothing is padded. Log-probs are those of the
suffixes: log p(answer | question) is `logprobs([Tree(question_ids, (answer_ids,))])`. For texts, load a tokenizer with
`rlkit.data.rendering.load_tokenizer`.
"""

from __future__ import annotations

import gc
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlkit.experience import Group, UserError
from rlkit.models.folder import model_folder
from rlkit.models.forward import PackedCausalLM, PackedScorer, layer_states
from rlkit.models.packing import PackedBatch, Tree, pack, split_by_tokens
from rlkit.models.policy import load_causal_lm, load_scorer, resolve_dtype

Head = Literal["language_model", "score"]
Pooling = Literal["last", "mean", "suffix_mean"]
Forward = Callable[[PackedBatch, Sequence[slice]], Tensor]
"""A packed batch, and each suffix's slice of its expanded tokens -> rows [R, ...]."""
Rows = Callable[[Tree], list[int]]


class Scorer:
    """A frozen model behind packed forward passes whose results are cached.

    A call returns one entry per sequence, tree after tree. The cache key is the content of a whole forward pass plus
    the kind of result. A hit is therefore bit-identical to what the pass would compute, and a run resumed with an empty
    cache gives the same numbers.
    """

    def __init__(
        self,
        module: PackedCausalLM | PackedScorer,
        *,
        device: str = "cpu",
        tokens_per_batch: int | None = 16384,
        cache_mib: float = 64.0,
        logit_elements_per_chunk: int = 2**24,
    ) -> None:
        """`tokens_per_batch`: tokens per forward pass; a shared prefix counts in each sequence. None: one pass per
        tree, so that its values do not depend, even in the last bit, on the call's other trees."""
        self.module: Any = module.to(device).eval().requires_grad_(False)
        self._device = device
        self._tokens_per_batch = tokens_per_batch
        self._chunk = logit_elements_per_chunk
        self._cache = _Cache(int(cache_mib * 2**20))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        head: Head = "language_model",
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        **options: Any,
    ) -> Scorer:
        """Load a Hugging Face folder, or `embedded:NAME`; head=score takes a classifier with one label.

        `options` are the constructor's. Raise ModelLoadError with the remedy.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        folder, kind = model_folder(str(path)), resolve_dtype(dtype, device)
        module = load_scorer(folder, kind) if head == "score" else load_causal_lm(folder, kind)
        return cls(module, device=device, **options)

    @property
    def model(self) -> Any:
        """The model. After changing its weights, call `forget`."""
        return self.module.model

    def logprobs(self, trees: Sequence[Tree], temperature: float = 1.0) -> list[np.ndarray]:
        """Return [T] float32 log-probs of each suffix's T tokens, each conditioned on all tokens before it."""
        self._require(PackedCausalLM, "log-probs", "language_model")

        def forward(packed: PackedBatch, suffixes: Sequence[slice]) -> Tensor:
            logprobs: Tensor = self.module(packed, temperature, self._chunk)[0]
            return logprobs

        return self._results(f"logprobs {temperature!r}", trees, forward, _suffix_lengths)

    def score(self, trees: Sequence[Tree]) -> list[float]:
        """Return each sequence's raw head score, read at its last token and computed in float32."""
        self._require(PackedScorer, "scores", "score")

        def forward(packed: PackedBatch, suffixes: Sequence[slice]) -> Tensor:
            scores: Tensor = self.module(packed)
            return scores

        return [float(row[0]) for row in self._results("score", _without_empty_prefixes(trees), forward, _one_each)]

    def hidden_states(self, trees: Sequence[Tree], layers: Sequence[int]) -> list[np.ndarray]:
        """Return [T, L, D] float32 states of each suffix's T tokens at L layers.

        Layers are numbered as in transformers' `hidden_states`: 0 is the embedding, -1 the final, normalised state.
        """

        def forward(packed: PackedBatch, suffixes: Sequence[slice]) -> Tensor:
            tokens = torch.cat([packed.expand[suffix] for suffix in suffixes])
            return layer_states(self.model, packed, layers)[tokens]

        return self._results(f"states {list(layers)}", trees, forward, _suffix_lengths)

    def embeddings(self, trees: Sequence[Tree], *, pooling: Pooling = "mean", layer: int = -1) -> np.ndarray:
        """Return [N, D] float32: a layer's state at each sequence's last token, or its mean over all or suffix tokens.

        Raise ValueError for an empty suffix with `suffix_mean`.
        """
        if pooling != "suffix_mean":
            trees = _without_empty_prefixes(trees)
        elif not all(map(len, (suffix for tree in trees for suffix in tree.suffixes))):
            raise ValueError("pooling=suffix_mean: a suffix is empty")

        def forward(packed: PackedBatch, suffixes: Sequence[slice]) -> Tensor:
            states = layer_states(self.model, packed, [layer])[:, 0].float()
            if pooling == "last":
                return states[packed.last]
            ends = np.cumsum(packed.lengths).tolist()
            whole = [slice(end - length, end) for end, length in zip(ends, packed.lengths, strict=True)]
            spans = whole if pooling == "mean" else suffixes
            return torch.stack([states[packed.expand[span]].mean(dim=0) for span in spans])

        return np.concatenate(self._results(f"embedding {pooling} {layer}", trees, forward, _one_each))

    def to(self, device: str) -> None:
        """Move the weights; before the next pass they must be back on the scorer's device."""
        self.module.to(device)

    def forget(self) -> None:
        self._cache.clear()

    def close(self) -> None:
        self.module = None
        self.forget()
        gc.collect()

    # -- inside --------------------------------------------------------------------------------------------------

    def _require(self, kind: type, what: str, head: Head) -> None:
        if not isinstance(self.module, kind):
            raise TypeError(f"{what} need a model that was loaded with head={head!r}")

    def _results(self, asked: str, trees: Sequence[Tree], forward: Forward, rows: Rows) -> list[np.ndarray]:
        parts, batches = self._plan([tree for tree in trees if tree.suffixes])
        results: list[list[np.ndarray]] = [[] for _ in parts]
        for batch in batches:
            chosen = [parts[i] for i in batch]
            counts = [count for tree in chosen for count in rows(tree)]
            pieces = iter(np.split(self._pass(asked, chosen, forward), np.cumsum(counts)[:-1]))
            for i in batch:
                results[i] = [next(pieces) for _ in parts[i].suffixes]
        return [piece for pieces in results for piece in pieces]

    def _plan(self, trees: list[Tree]) -> tuple[list[Tree], list[list[int]]]:
        """Split trees too large for one forward pass; return the parts, and which of them share a pass."""
        limit = self._tokens_per_batch
        if limit is None:
            return trees, [[i] for i in range(len(trees))]
        parts = [part for tree in trees for part in tree.cut(limit)]
        return parts, split_by_tokens([part.expanded_tokens for part in parts], limit)

    def _pass(self, asked: str, trees: Sequence[Tree], forward: Forward) -> np.ndarray:
        key = _content(asked, trees)
        rows = self._cache.get(key)
        if rows is None:
            with torch.inference_mode():
                result = forward(pack(trees).to(self._device), _suffixes(trees))
            rows = result.float().cpu().numpy()
            self._cache.put(key, rows)
        return rows


def group_tree(group: Group) -> Tree:
    """Return a group as a tree. Raise UserError if a sample has several segments: they do not follow the prompt."""
    if any(sample.segments for sample in group.samples):
        raise UserError(
            "this reward runs a model over prompt and response as one row, and episodes here are several rows (an "
            "agent's, or those of environment.history=rerender); name another reward"
        )
    return Tree(group.prompt.token_ids, tuple(sample.token_ids.tolist() for sample in group.samples))


class _Cache:
    """A cache of at most `limit` bytes; the least recently used entries are dropped first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._arrays: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, key: bytes) -> np.ndarray | None:
        if key in self._arrays:
            self._arrays.move_to_end(key)
        return self._arrays.get(key)

    def put(self, key: bytes, array: np.ndarray) -> None:
        array.flags.writeable = False  # callers get views of it
        if array.nbytes > self._limit:
            return
        self._arrays[key] = array
        self._bytes += array.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._arrays.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._arrays.clear()
        self._bytes = 0


def _content(asked: str, trees: Sequence[Tree]) -> bytes:
    digest = hashlib.blake2b(asked.encode(), digest_size=16)
    for tree in trees:
        sequences = (tree.prefix, *tree.suffixes)
        digest.update(np.array([len(sequences), *map(len, sequences)], dtype=np.int64).tobytes())
        for ids in sequences:
            digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    return digest.digest()


def _suffix_lengths(tree: Tree) -> list[int]:
    return [len(suffix) for suffix in tree.suffixes]


def _one_each(tree: Tree) -> list[int]:
    return [1] * len(tree.suffixes)


def _suffixes(trees: Sequence[Tree]) -> list[slice]:
    ends = np.cumsum([len(tree.prefix) + len(suffix) for tree in trees for suffix in tree.suffixes]).tolist()
    lengths = [length for tree in trees for length in _suffix_lengths(tree)]
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _without_empty_prefixes(trees: Sequence[Tree]) -> list[Tree]:
    """Split trees without a prefix into trees of one sequence."""
    return [
        part
        for tree in trees
        for part in ([tree] if tree.prefix else [Tree(suffix, ((),)) for suffix in tree.suffixes])
    ]
