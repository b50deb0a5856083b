"""The scorer of likelihoods against plain transformers, one sequence at a time, and its cache."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixture import make_groups, segmented, write_tiny_model
from polar_fixture import tiny_discriminator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rewards.services.scorer as module
from rewards.base import Reward, RewardConfig, RewardContext
from rewards.services.scorer import Scorer, group_tree
from rlkit.experience import GroupScores, Score, UserError
from rlkit.models.forward import ModelLoadError
from rlkit.models.packing import Tree

TREES = [
    Tree((3, 4, 5, 6), ((7, 8), (9,), (10, 11, 12, 13, 14, 15, 16))),
    Tree((20,), ((21, 22, 23),)),
    Tree((30, 31), ()),
    Tree((30, 31), ((32,), (33, 34, 35, 36))),
]
SEQUENCES = [((*tree.prefix, *suffix), len(suffix)) for tree in TREES for suffix in tree.suffixes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("scorer") / "model", initializer_range=0.2)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_discriminator(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[Any]:
    """transformers' output for each sequence alone: logits and the states of all layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return [model(torch.tensor([ids]), output_hidden_states=True) for ids, _ in SEQUENCES]


def plain_states(output: Any, layer: int) -> np.ndarray:
    return output.hidden_states[layer][0].numpy()


def passes_of(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of packed tokens at each forward pass."""
    sizes: list[int] = []
    forward = scorer.module.forward

    def counted(packed: Any, *options: Any) -> Any:
        sizes.append(len(packed.token_ids))
        return forward(packed, *options)

    monkeypatch.setattr(scorer.module, "forward", counted)
    return sizes


@pytest.mark.parametrize("tokens_per_batch", [None, 8, 16384])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_sequence_alone(
    folder: Path, plain: list[Any], tokens_per_batch: int | None, temperature: float
) -> None:
    scorer = Scorer.load(folder, tokens_per_batch=tokens_per_batch)
    logprobs = scorer.logprobs(TREES, temperature)
    assert [len(row) for row in logprobs] == [length for _, length in SEQUENCES]
    for row, (ids, length), output in zip(logprobs, SEQUENCES, plain, strict=True):
        expected = torch.log_softmax(output.logits[0] / temperature, dim=-1)
        rows = range(len(ids) - length, len(ids))
        np.testing.assert_allclose(row, [float(expected[i - 1, ids[i]]) for i in rows], atol=1e-5)
    assert np.concatenate(logprobs).std() > 0.1, "equal log-probs would prove nothing"


@pytest.mark.parametrize("layers", [[0], [1, 2], [-1], [2, 0]])
def test_hidden_states_of_chosen_layers(folder: Path, plain: list[Any], layers: list[int]) -> None:
    states = Scorer.load(folder).hidden_states(TREES, layers)
    for row, (ids, length), output in zip(states, SEQUENCES, plain, strict=True):
        expected = np.stack([plain_states(output, layer)[len(ids) - length :] for layer in layers], axis=1)
        np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("last", lambda states, suffix: states[-1]),
        ("mean", lambda states, suffix: states.mean(axis=0)),
        ("suffix_mean", lambda states, suffix: states[-suffix:].mean(axis=0)),
    ],
)
def test_embeddings_are_pooled_states(
    folder: Path, plain: list[Any], pooling: Any, pool: Callable[[np.ndarray, int], np.ndarray], layer: int
) -> None:
    embeddings = Scorer.load(folder).embeddings(TREES, pooling=pooling, layer=layer)
    expected = [pool(plain_states(output, layer), suffix) for output, (_, suffix) in zip(plain, SEQUENCES, strict=True)]
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [None, 8, 16384])
def test_scores_are_the_classifiers(classifier: Path, tokens_per_batch: int | None) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        expected = [float(model(torch.tensor([ids])).logits) for ids, _ in SEQUENCES]
    scorer = Scorer.load(classifier, head="score", tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(scorer.score(TREES), expected, atol=1e-5)
    together = scorer.score([Tree.of([ids for ids, _ in SEQUENCES])])  # they have no common beginning
    np.testing.assert_allclose(together, expected, atol=1e-5)


def test_a_shared_prefix_is_computed_once_and_nothing_is_padded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer.load(folder)
    sizes = passes_of(scorer, monkeypatch)
    scorer.logprobs([Tree(range(3, 43), ((50, 51), (52,), (53, 54, 55)))])
    assert sizes == [46]


def test_the_budget_counts_a_prefix_in_every_sequence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer.load(folder, tokens_per_batch=12)
    sizes = passes_of(scorer, monkeypatch)
    scorer.logprobs([Tree((3, 4, 5, 6), ((7, 8), (9, 10), (11, 12))), Tree((20,), ((21,) * 20,))])
    assert sorted(sizes) == [6, 8, 21]  # two sequences of six; the third; one above the budget


def test_asking_again_costs_nothing_and_gives_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer.load(folder)
    sizes = passes_of(scorer, monkeypatch)
    first = scorer.logprobs(TREES)
    for again in (scorer.logprobs(TREES), Scorer.load(folder).logprobs(TREES)):
        for left, right in zip(first, again, strict=True):
            np.testing.assert_array_equal(left, right)
    assert len(sizes) == 1
    with pytest.raises(ValueError, match="read-only"):
        first[0][0] = 0.0


def test_another_question_is_another_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer.load(folder)
    sizes = passes_of(scorer, monkeypatch)
    scorer.logprobs([Tree((3, 4), ((5, 6),))])
    scorer.logprobs([Tree((3, 4), ((5, 6),))], temperature=0.5)
    scorer.logprobs([Tree((3,), ((4, 5, 6),))])
    scorer.logprobs([Tree((3, 4), ((5,), (6,)))])
    assert len(sizes) == 4
    one, two = scorer.hidden_states(TREES[:1], [1]), scorer.hidden_states(TREES[:1], [2])
    assert not np.allclose(one[0], two[0])


def test_the_cache_is_bounded_and_drops_what_was_not_used_for_longest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer.load(folder, tokens_per_batch=None, cache_mib=80 / 2**20)  # two results of ten float32
    sizes = passes_of(scorer, monkeypatch)
    a, b, c, large = (Tree((first,), ((7,) * length,)) for first, length in ((3, 10), (4, 10), (5, 10), (6, 30)))
    for tree in (a, b, a, c, a):  # c drives b out, not a
        scorer.logprobs([tree])
    assert len(sizes) == 3
    scorer.logprobs([b])
    assert len(sizes) == 4
    for _ in range(2):
        scorer.logprobs([large])  # never kept, and nothing makes room for it
    scorer.logprobs([b])
    assert len(sizes) == 6


def test_new_weights_forget_old_results(folder: Path) -> None:
    scorer = Scorer.load(folder)
    before = scorer.logprobs(TREES)
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.mul_(1.5)
    scorer.forget()
    assert not np.allclose(before[0], scorer.logprobs(TREES)[0])


def test_alone_in_its_pass_a_tree_does_not_depend_on_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer.load(folder, tokens_per_batch=None)
    sizes = passes_of(scorer, monkeypatch)
    together = scorer.logprobs(TREES)
    alone = [row for tree in TREES for row in Scorer.load(folder, tokens_per_batch=None).logprobs([tree])]
    for left, right in zip(together, alone, strict=True):
        np.testing.assert_array_equal(left, right)
    scorer.logprobs(TREES[1:2])
    assert len(sizes) == 3  # TREES[2] has no sequence; TREES[1] was in the cache


def test_half_precision_and_threads(folder: Path) -> None:
    half = Scorer.load(folder, dtype="bfloat16", threads=1)
    assert half.model.dtype == torch.bfloat16 and torch.get_num_threads() == 1
    for left, right in zip(half.logprobs(TREES), Scorer.load(folder).logprobs(TREES), strict=True):
        assert left.dtype == np.float32
        np.testing.assert_allclose(left, right, atol=0.3)


def test_what_the_model_cannot_answer_is_refused(folder: Path, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="scores need a model that was loaded with head='score'"):
        Scorer.load(folder).score(TREES)
    with pytest.raises(TypeError, match="log-probs need a model that was loaded with head='language_model'"):
        Scorer.load(classifier, head="score").logprobs(TREES)
    with pytest.raises(ModelLoadError, match="they would be random"):
        Scorer.load(folder, head="score")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        Scorer.load(tmp_path)
    with pytest.raises(ValueError, match="a suffix is empty"):
        Scorer.load(folder).embeddings([Tree((3, 4), ((),))], pooling="suffix_mean")


def test_the_reward_of_the_docstring(folder: Path) -> None:
    text = (module.__doc__ or "").partition("A reward built on it:\n")[2].partition("\nSequences come")[0]
    names: dict[str, Any] = dict(
        Reward=Reward, RewardConfig=RewardConfig, Score=Score, GroupScores=GroupScores, **vars(module)
    )
    exec(textwrap.dedent(text), names)
    kind: type[Reward] = names["Likelihood"]
    reward = kind(kind.Config(model_path=str(folder)), RewardContext())  # type: ignore[call-arg]
    reward.start()
    groups = make_groups()
    logprobs = iter(Scorer.load(folder).logprobs([group_tree(group) for group in groups]))
    for group, scores in zip(groups, reward.score(groups), strict=True):
        assert [score.value for score in scores.samples] == [float(next(logprobs).mean()) for _ in group.samples]


def test_tokens_of_several_rows_are_no_tree() -> None:
    (group,) = segmented(make_groups(count=1))
    with pytest.raises(UserError, match="episodes here are several rows"):
        group_tree(group)
