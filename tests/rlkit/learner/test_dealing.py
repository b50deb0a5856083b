"""The driver's plan: every sample computed once, by one rank, within the budget; nothing else is sent."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_fixture import grpo_advantages, make_groups

from algorithms.base import Advantages, AlgorithmNeeds
from rlkit.config.schema import CriticConfig, LearnerConfig
from rlkit.experience import Group, Message
from rlkit.learner.batches import IDLE, Microbatch, PolicyRows, Share
from rlkit.learner.dealing import passes, policy_shares, split_tree, value_shares
from rlkit.models.packing import KEYS_PER_TOKEN, Tree

Key = tuple[tuple[int, ...], tuple[int, ...]]


def partly_masked(group: Group, seed: int) -> Group:
    """A third of its tokens is not trained."""
    rng = np.random.default_rng(seed)
    return replace(group, samples=tuple(replace(s, mask=rng.random(len(s)) > 0.3) for s in group.samples))


def keys(microbatch: Microbatch) -> list[Key]:
    """Prompt and response of every sample."""
    responses = np.split(microbatch.token_ids, np.cumsum(microbatch.lengths)[:-1])
    prompts = [p for p, size in zip(microbatch.prompts, microbatch.sizes, strict=True) for _ in range(size)]
    return [(tuple(p.tolist()), tuple(r.tolist())) for p, r in zip(prompts, responses, strict=True)]


def tokens(microbatch: Microbatch) -> int:
    return sum(map(len, microbatch.prompts)) + len(microbatch.token_ids)


def computed(shares: list[Share[PolicyRows]]) -> list[Microbatch]:
    return [
        microbatch
        for share in shares
        for minibatch in share.minibatches
        for microbatch, rows in minibatch.microbatches
        if rows is not None
    ]


def config(**options: int) -> LearnerConfig:
    return LearnerConfig(**options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 7), st.integers(1, 5), st.integers(0, 9), st.integers(1, 4), st.integers(1, 5), st.integers(1, 120)
)
def test_a_plan_trains_every_sample_once_within_the_limit(
    count: int, samples: int, seed: int, minibatches: int, ranks: int, limit: int
) -> None:
    groups = [partly_masked(group, seed) for group in make_groups(count, max(2, samples), seed)]
    advantages = grpo_advantages(groups)
    numbers = np.arange(sum(map(len, advantages.tokens)), dtype=np.float32)  # a number of its own for every token
    advantages = replace(advantages, tokens=np.split(numbers, np.cumsum([len(row) for row in advantages.tokens])[:-1]))
    every = [(group, sample) for group in groups for sample in group.samples]
    kept = [i for i, (_, s) in enumerate(every) if advantages.keep[i] and s.trained.any()]
    wanted = Counter((g.prompt.token_ids, tuple(s.token_ids.tolist())) for g, s in (every[i] for i in kept))
    row_of = {row[0]: i for i, row in enumerate(advantages.tokens) if len(row)}
    for layout in ("any", "full_group"):
        shares, metrics = policy_shares(
            groups,
            advantages,
            config(minibatches_per_step=minibatches, ranks=ranks, tokens_per_microbatch=limit),
            AlgorithmNeeds(layout=layout),  # type: ignore[arg-type]
        )
        assert metrics == {"policy/trained_samples": len(kept)}
        assert len(shares) == ranks
        assert Counter(key for micro in computed(shares) for key in keys(micro)) == wanted
        for share in shares:
            for minibatch in share.minibatches:
                for micro, rows in minibatch.microbatches:
                    if rows is None:
                        assert micro is IDLE
                        continue
                    ends = np.cumsum(micro.lengths)[:-1]
                    for key, row, mask, rollout in zip(
                        keys(micro),
                        np.split(rows.advantages, ends),
                        np.split(rows.mask, ends),
                        np.split(rows.rollout_logprobs, ends),
                        strict=True,
                    ):
                        group, sample = every[row_of[row[0]]]
                        assert key == (group.prompt.token_ids, tuple(sample.token_ids.tolist()))
                        np.testing.assert_array_equal(mask, sample.trained)
                        np.testing.assert_array_equal(rollout, sample.logprobs)
                    assert tokens(micro) <= limit or len(micro.prompts) == 1
                    if layout == "any" and tokens(micro) > limit:
                        assert micro.sizes == (1,)
        for ranks_of in zip(*(share.minibatches for share in shares), strict=True):
            assert len({len(minibatch.microbatches) for minibatch in ranks_of}) == 1, "ranks would wait for ever"
            assert len({minibatch.denominators for minibatch in ranks_of}) == 1
        counts = [minibatch.denominators for minibatch in shares[0].minibatches]
        assert sum(c.sequences for c in counts) == len(kept)
        assert sum(c.tokens for c in counts) == sum(int(every[i][1].trained.sum()) for i in kept)
        if layout == "full_group":
            assert sum(len(micro.prompts) for micro in computed(shares)) == sum(c.groups for c in counts)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 9), st.integers(1, 5), st.integers(1, 120))
def test_passes_give_every_sample_its_own_rows(count: int, samples: int, seed: int, ranks: int, limit: int) -> None:
    groups = make_groups(count, max(2, samples), seed)
    work = passes(groups, config(ranks=ranks, tokens_per_microbatch=limit))
    assert len({len(of_rank) for of_rank in work.microbatches}) == 1
    for micro in (micro for of_rank in work.microbatches for micro in of_rank):
        assert tokens(micro) <= limit or micro.sizes == (1,)
    results = [np.concatenate([micro.token_ids for micro in of_rank]) for of_rank in work.microbatches]
    for sample, row in zip((s for g in groups for s in g.samples), work.per_sample(results), strict=True):
        np.testing.assert_array_equal(row, sample.token_ids)


def test_a_group_is_split_by_the_keys_that_attention_holds() -> None:
    tree, limit = Tree(range(200), [range(10)] * 8), 400
    assert tree.tokens < limit
    parts = [Tree(tree.prefix, [tree.suffixes[i] for i in part]) for part in split_tree(tree, limit)]
    assert len(parts) == 2
    assert all(part.attention_tokens <= KEYS_PER_TOKEN * limit for part in parts)


def test_a_share_holds_no_text_and_no_other_samples() -> None:
    groups = []
    for g, group in enumerate(make_groups(count=8, samples=4, seed=1)):
        samples = tuple(
            replace(s, text=f"SECRET text {g}", token_ids=np.full(len(s), 1000 * g + i, np.int32))
            for i, s in enumerate(group.samples)
        )
        asked = replace(
            group.prompt,
            messages=(Message("user", "SECRET question"),),
            answer="SECRET answer",
            references=("SECRET reference",),
            columns={"tests": "SECRET tests"},
        )
        groups.append(replace(group, prompt=asked, samples=samples))
    shares, _ = policy_shares(groups, grpo_advantages(groups), config(ranks=4), AlgorithmNeeds())
    seen = []
    for share in shares:
        raw = pickle.dumps(share)
        assert b"SECRET" not in raw
        seen.append({int(i) for micro in computed([share]) for i in np.unique(micro.token_ids)})
        tokens_of = sum(len(micro.token_ids) for micro in computed([share]))
        prompts = sum(len(p) for micro in computed([share]) for p in micro.prompts)
        assert len(raw) < 13 * tokens_of + 4 * prompts + 3000  # ids, advantages, log-probs: 4 bytes each; mask: 1
    assert all(seen)
    assert sum(map(len, seen)) == len(set.union(*seen)) == 8 * 4 - 1  # one sample is invalid


def test_what_attention_expands_is_charged() -> None:
    """A long prompt's keys are copied for each sample: 16 short ones do not fit where their tokens alone would."""
    (group,) = make_groups(count=1, samples=16, seed=6, longest=8)
    group = replace(group, prompt=replace(group.prompt, token_ids=tuple(range(200))))
    limit = 200 + sum(map(len, group.samples))
    work = passes([group], config(tokens_per_microbatch=limit))
    shares, _ = policy_shares([group], grpo_advantages([group]), config(tokens_per_microbatch=limit), AlgorithmNeeds())
    for micro in (*work.microbatches[0], *computed(shares)):
        tree = Tree(range(200), tuple(range(n) for n in micro.lengths))
        assert micro.sizes == (len(micro.lengths),)
        assert tree.charged_tokens <= limit


def test_few_groups_are_split_so_that_no_rank_is_idle() -> None:
    groups = make_groups(count=3, samples=6, seed=2)
    advantages = replace(grpo_advantages(groups), keep=np.ones(18, dtype=np.bool_))
    shares, _ = policy_shares(groups, advantages, config(ranks=8), AlgorithmNeeds())
    loads = [sum(map(tokens, computed([share]))) for share in shares]
    assert min(loads) > 0
    assert shares[0].minibatches[0].denominators.groups == 3
    whole, _ = policy_shares(groups, advantages, config(ranks=8), AlgorithmNeeds(layout="full_group"))
    assert sum(bool(computed([share])) for share in whole) == 3


def test_samples_without_an_advantage_are_counted_but_not_computed() -> None:
    groups = make_groups(count=4, samples=4, seed=3)
    advantages = grpo_advantages(groups)
    first = len(groups[0].samples)
    silent = set(range(first, 2 * first + 1))
    rows = [np.zeros_like(row) if i in silent else np.ones_like(row) for i, row in enumerate(advantages.tokens)]
    advantages = replace(advantages, tokens=rows, keep=np.ones(len(rows), dtype=np.bool_))
    needs = AlgorithmNeeds(skips_zero_advantages=True)
    (share,), metrics = policy_shares(groups, advantages, config(), needs)
    (whole,), _ = policy_shares(groups, advantages, config(), AlgorithmNeeds())
    assert metrics == {"policy/trained_samples": 16, "policy/silent_samples": 5}
    assert sum(len(micro.lengths) for micro in computed([share])) == 11
    mine, all_of_them = share.minibatches[0].denominators, whole.minibatches[0].denominators
    assert replace(mine, computed_tokens=None) == all_of_them
    assert mine.measured == mine.tokens - sum(len(rows[i]) for i in silent)
    # losses that compare samples get all of them
    (paired,), metrics = policy_shares(groups, advantages, config(), replace(needs, layout="pairs"))
    assert sum(len(micro.lengths) for micro in computed([paired])) == 16
    assert "policy/silent_samples" not in metrics
    # a step of such samples alone still has its optimizer step, with an idle pass on every rank
    nothing = replace(advantages, tokens=[np.zeros_like(row) for row in rows])
    for share in policy_shares(groups, nothing, config(ranks=2, minibatches_per_step=2), needs)[0]:
        assert [minibatch.microbatches for minibatch in share.minibatches] == [((IDLE, None),)] * 2
        assert all(minibatch.denominators.measured == 0 for minibatch in share.minibatches)


def test_the_critic_learns_from_all_samples() -> None:
    groups = make_groups(count=3, samples=2, seed=4)
    zeros = [np.zeros(len(s), dtype=np.float32) for g in groups for s in g.samples]
    values = [np.full(len(s), i, dtype=np.float32) for i, s in enumerate(s for g in groups for s in g.samples)]
    advantages = Advantages(zeros, np.ones(6, dtype=np.bool_), returns=[v + 0.5 for v in values])
    shares = value_shares(groups, advantages, values, CriticConfig(ranks=2, tokens_per_microbatch=30))
    rows = [rows for share in shares for m in share.minibatches for _, rows in m.microbatches if rows is not None]
    assert sorted({float(v) for r in rows for v in r.old_values}) == [0, 1, 2, 3, 4, 5]
    for r in rows:
        np.testing.assert_array_equal(r.returns, r.old_values + 0.5)
