"""Packed forward passes equal plain transformers on each sequence alone: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlkit.models.attention import PACKED_ATTENTION
from rlkit.models.forward import PackedCausalLM, PackedScorer
from rlkit.models.packing import Tree, pack, split_by_tokens

TREES = [
    Tree(prefix=(3, 4, 5, 6), suffixes=((7, 8), (9,), (10, 11, 12, 13, 14, 15, 16))),
    Tree(prefix=(20,), suffixes=((21, 22, 23),)),
    Tree(prefix=(30, 31), suffixes=((), (32,))),
]


def tiny(kind: type, attention: str, kv_heads: int = 2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        num_labels=1,
    )
    config._attn_implementation = attention
    return kind(config)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("elements", [50, 10_000])
def test_logprobs_and_gradients_equal_plain_forward_of_each_sequence(kv_heads, temperature, elements):
    plain = tiny(LlamaForCausalLM, "eager", kv_heads)
    packed_model = PackedCausalLM(tiny(LlamaForCausalLM, PACKED_ATTENTION, kv_heads))
    packed_model.model.load_state_dict(plain.state_dict())
    wanted, entropies = [], []
    for tree in TREES:
        for suffix in tree.suffixes:
            ids = torch.tensor([*tree.prefix, *suffix])
            logp = torch.log_softmax(plain(ids[None]).logits[0].float() / temperature, dim=-1)
            for i in range(len(tree.prefix), len(ids)):
                wanted.append(logp[i - 1, ids[i]])
                entropies.append(-(logp[i - 1].exp() * logp[i - 1]).sum())
    logprobs, entropy = packed_model(pack(TREES), temperature, elements)
    torch.testing.assert_close(logprobs, torch.stack(wanted), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.stack(entropies), atol=2e-6, rtol=1e-5)

    weights = torch.linspace(-1, 2, len(wanted))
    (torch.stack(wanted) * weights + 0.3 * torch.stack(entropies) * weights.flip(0)).sum().backward()
    (logprobs * weights + 0.3 * entropy * weights.flip(0)).sum().backward()
    for (name, ours), (_, theirs) in zip(packed_model.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_scores_equal_plain_classifier_of_each_sequence():
    plain = tiny(LlamaForSequenceClassification, "eager")
    scorer = PackedScorer(tiny(LlamaForSequenceClassification, PACKED_ATTENTION))
    scorer.model.load_state_dict(plain.state_dict())
    wanted = [
        plain.score(plain.model(torch.tensor([[*t.prefix, *s]])).last_hidden_state[0, -1])
        for t in TREES
        for s in t.suffixes
    ]
    torch.testing.assert_close(scorer(pack(TREES)), torch.cat(wanted), atol=1e-6, rtol=1e-5)


def test_prompt_is_stored_once_per_group():
    batch = pack([Tree(prefix=range(100), suffixes=[(1, 2)] * 8)])
    assert len(batch.token_ids) == 116
    assert batch.lengths == (102,) * 8


def test_padding_in_attention_is_bounded():
    batch = pack([Tree(prefix=(1,), suffixes=[[2] * n for n in (400, 390, 20, 19, 18, 3)])])
    padded = sum(bucket.keys.numel() for bucket in batch.buckets)
    assert padded / sum(batch.lengths) < 1 / 0.75


@given(sizes=st.lists(st.integers(1, 120), max_size=40), limit=st.integers(20, 200))
@settings(deadline=None)
def test_microbatches_hold_every_item_once_within_the_limit(sizes, limit):
    split = split_by_tokens(sizes, limit)
    assert sorted(i for members in split for i in members) == list(range(len(sizes)))
    for members in split:
        assert sum(sizes[i] for i in members) <= limit or len(members) == 1


@pytest.mark.parametrize("trees", [[], [Tree((), ((),))], [Tree((), ((1,),))]])
def test_pack_refuses_what_cannot_be_predicted(trees):
    with pytest.raises(ValueError, match=r"zero|empty|prefix"):
        pack(trees)
