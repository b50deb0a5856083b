"""Packed attention equals transformers' eager attention on each sequence alone: values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel

from rlkit.models import attention, packing
from rlkit.models.attention import PACKED_ATTENTION, Pattern, packed_attention, packed_mask
from rlkit.models.packing import KEYS_PER_TOKEN, Tree, pack

TREES = [
    Tree(prefix=tuple(range(3, 22)), suffixes=((7, 8), (9,), (10, 11, 12, 13, 14, 15, 16, 17, 18, 19), ())),
    Tree(prefix=(20,), suffixes=((21, 22, 23),)),
    Tree(prefix=tuple(range(30, 48)), suffixes=((31, 32, 33, 34), (5, 6, 7, 8, 9, 10, 11, 12, 13))),
    Tree(prefix=(30, 31), suffixes=((), (32,))),
]

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "first_k_dense_replace": 1,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {**SLIDING, "use_sliding_window": True},
    "qwen2_moe": {**SLIDING, **EXPERTS, "use_sliding_window": True},  # tells its window by the mask alone
    "phimoe": {**EXPERTS, "sliding_window": 5},  # so does this
    "gemma2": {**SLIDING, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "gpt_oss": {**SLIDING, **EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "llama4_text": {
        **EXPERTS,
        "attention_chunk_size": 5,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "intermediate_size_mlp": 32,
        "interleave_moe_layer_step": 2,
    },
    "deepseek_v3": LATENT,
}
"""Layers: windows (per layer, too), chunks, sinks, soft caps, and values narrower than keys (MLA)."""


def tiny(model_type: str, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **options})
    config._attn_implementation = "eager"
    plain = AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
            elif "sinks" in name:
                parameter.normal_()
    packed = copy.deepcopy(plain)
    packed.set_attn_implementation(PACKED_ATTENTION)
    return plain, packed


def gradients(model, states):
    weights = torch.linspace(-1, 1, states.numel()).view_as(states)
    (states * weights.cos()).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(model, trees):
    """[F, D] states of every sequence's tokens."""
    sequences = [[*tree.prefix, *suffix] for tree in trees for suffix in tree.suffixes]
    return torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0] for ids in sequences])


def together(model, trees):
    batch = pack(trees)
    ids, positions = batch.token_ids[None], batch.position_ids[None]
    states = model(input_ids=ids, position_ids=positions, use_cache=False, packed=batch).last_hidden_state[0]
    return states[batch.expand]


def check(model_type, options, *, checkpointing=False):
    plain, packed = tiny(model_type, **options)
    if checkpointing:
        packed.gradient_checkpointing_enable()
        packed.train()
    expected, states = alone(plain, TREES), together(packed, TREES)
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-4)
    expected, ours = gradients(plain, expected), gradients(packed, states)
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(ours[name], gradient, atol=atol, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("model_type", MODELS)
def test_states_and_gradients_equal_eager_attention_of_each_sequence(model_type):
    check(model_type, MODELS[model_type])


def test_gradient_checkpointing_keeps_windows_and_soft_caps():
    check("gemma2", MODELS["gemma2"], checkpointing=True)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_scores_computed_in_blocks_are_those_of_one_block(model_type, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "SCORES_PER_BLOCK", 4 * 7 * 25)
    monkeypatch.setattr(attention, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    check(model_type, MODELS[model_type])
    assert calls


def rows(batch, heads=4, key_heads=2, width=8):
    torch.manual_seed(1)
    count = len(batch.token_ids)
    return [torch.randn(1, h, count, width, requires_grad=True) for h in (heads, key_heads, key_heads)]


def attend(batch, tensors, **options):
    output, _ = packed_attention(torch.nn.Identity(), *tensors, options.pop("mask", None), packed=batch, **options)
    return output, *torch.autograd.grad(output.square().sum(), tensors)


@pytest.mark.parametrize("mask", [None, Pattern(window=6), Pattern(chunk=4)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_prefix_that_attends_once_changes_nothing(mask, softcap, monkeypatch):
    once = pack(TREES)
    tensors = rows(once)
    result = attend(once, tensors, mask=mask, softcap=softcap)
    monkeypatch.setattr(packing, "LEAST_SHARED_PREFIX", 1000)
    each = pack(TREES)
    assert sum(b.queries.numel() for b in once.buckets) < sum(b.queries.numel() for b in each.buckets)
    for a, b in zip(result, attend(each, tensors, mask=mask, softcap=softcap), strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


def test_queries_of_a_shared_prefix_attend_once_and_its_keys_are_counted():
    tree = Tree(range(2048), [range(128)] * 16)
    batch = pack([tree])
    assert sum(bucket.queries.numel() for bucket in batch.buckets) == len(batch.runs.queries) == tree.tokens == 4096
    assert sum(bucket.keys.numel() for bucket in batch.buckets) == len(batch.runs.keys) == tree.attention_tokens
    assert tree.attention_tokens == 17 * 2048 + 16 * 128


@pytest.mark.parametrize("tree", TREES)
def test_attention_tokens_are_the_keys_held(tree):
    assert tree.attention_tokens == len(pack([tree]).runs.keys)


def test_long_prompts_are_charged_for_their_copied_keys():
    short, long = Tree(range(100), [range(500)] * 16), Tree(range(8192), [range(512)] * 16)
    assert short.charged_tokens == short.tokens
    assert long.tokens == 16384
    assert long.charged_tokens * KEYS_PER_TOKEN == long.attention_tokens == 147456


@pytest.mark.parametrize("mask", [None, Pattern(window=6)])
def test_plan_for_flash_attention_is_that_of_the_padded_path(mask, monkeypatch):
    """The kernel needs a GPU; in its place stands what its documentation says."""

    def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert max_q == cu_q.diff().max()
        assert max_k == cu_k.diff().max()
        outputs = []
        for i in range(len(cu_q) - 1):
            qs, ks, vs = (t[c[i] : c[i + 1]].transpose(0, 1) for t, c in ((q, cu_q), (k, cu_k), (v, cu_k)))
            ahead = torch.arange(ks.shape[1]) - (torch.arange(qs.shape[1])[:, None] + ks.shape[1] - qs.shape[1])
            seen = (ahead <= window_size[1]) & ((ahead >= -window_size[0]) | (window_size[0] < 0))
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    qs, ks, vs, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
                ).transpose(0, 1)
            )
        return torch.cat(outputs)

    batch = pack(TREES)
    tensors = rows(batch)
    expected = attend(batch, tensors, mask=mask)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in tensors)
    output = attention._varlen(q, k, v, batch, mask or Pattern(), 8**-0.5)[None]
    for a, b in zip((output, *torch.autograd.grad(output.square().sum(), tensors)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"indices": torch.zeros(1)}, "indices"),
        ({"mask": torch.zeros(1, 1, 5, 5)}, "mask of its own"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "later tokens"),
        ({"sliding_window": 4}, "window of 4 tokens that its mask does not have"),
        ({"sliding_window": 4, "mask": Pattern(window=3)}, "window of 4"),
    ],
)
def test_what_is_not_implemented_is_refused(options, words):
    batch = pack([Tree((1, 2, 3), ((4, 5),))])
    with pytest.raises(ValueError, match=words):
        attend(batch, rows(batch), **options)


def test_keys_of_other_tokens_are_refused():
    batch = pack([Tree((1, 2, 3), ((4, 5),))])
    q, k, v = rows(batch)
    with pytest.raises(ValueError, match="5 queries and 4 keys for 5 tokens"):
        attend(batch, [q, k[:, :, 1:], v[:, :, 1:]])


def test_models_that_drop_their_keyword_arguments_are_refused():
    with pytest.raises(ValueError, match="keyword arguments"):
        packed_attention(torch.nn.Identity(), *rows(pack(TREES)), None)


def test_window_longer_than_every_sequence_is_no_window():
    batch = pack(TREES)
    tensors = rows(batch)
    expected = attend(batch, tensors)
    for result in (attend(batch, tensors, mask=Pattern(window=29)), attend(batch, tensors, sliding_window=29)):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_masks_that_are_not_causal_are_refused():
    from transformers.masking_utils import bidirectional_mask_function, or_masks, sliding_window_causal_mask_function

    assert packed_mask(mask_function=sliding_window_causal_mask_function(7)) == Pattern(window=7)
    for mask in (bidirectional_mask_function, or_masks(sliding_window_causal_mask_function(7))):
        with pytest.raises(ValueError, match="does not implement a mask of"):
            packed_mask(mask_function=mask)


def test_grids_hold_each_sequence_and_find_each_token():
    batch = pack(TREES)
    grids, collapse = batch.sequence_grids
    flat = torch.cat([grid.reshape(-1) for grid in grids])
    assert sum(len(grid) for grid in grids) == len(batch.lengths)
    assert torch.equal(flat[collapse], torch.arange(len(batch.token_ids)))
    held = {tuple(batch.token_ids[row].tolist()) for grid in grids for row in grid}
    for tree in TREES:
        for suffix in tree.suffixes:
            ids = (*tree.prefix, *suffix)
            assert any(row[: len(ids)] == ids and set(row[len(ids) :]) <= {ids[-1]} for row in held)
