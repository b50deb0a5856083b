"""Small groups and learners for tests of the learner, the losses and their invariances."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from algorithms.base import Advantages, Experience
from algorithms.grpo import GRPO
from rlkit.config.schema import LearnerConfig
from rlkit.experience import Group, GroupScores, Message, Prompt, Sample, Score
from rlkit.learner.engine import guarded_adamw, init_process_group
from rlkit.learner.policy import PolicyLearner

VOCABULARY = 60


def write_tiny_model(folder: Path, seed: int = 0, initializer_range: float = 0.02) -> Path:
    """A random two-layer Llama; a large `initializer_range` makes it prefer some tokens."""
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=initializer_range,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    ).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """One token per word: `w3` ... for the ids of `write_tiny_model`."""
    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def make_groups(count: int = 4, samples: int = 4, seed: int = 0, longest: int = 20) -> list[Group]:
    """Scored groups with ragged responses; the second sample of the first group is invalid."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(count):
        responses = []
        for i in range(samples):
            length = int(rng.integers(1, longest))
            responses.append(
                Sample(
                    index=i,
                    token_ids=rng.integers(3, VOCABULARY, length).astype(np.int32),
                    logprobs=(-4 + 0.2 * rng.standard_normal(length)).astype(np.float32),
                    text="",
                    finish_reason="stop",
                    policy_versions=(0, 0),
                    seed=i,
                )
            )
        scores = [Score(value=float(rng.integers(0, 3))) for _ in range(samples)]
        if g == 0:
            scores[1] = Score.invalid("timeout: test")
        prompt = Prompt(f"p{g}", (Message("user", "?"),), tuple(rng.integers(3, VOCABULARY, 5 + g).tolist()))
        groups.append(Group(f"g{g}", prompt, tuple(responses)).with_scores(GroupScores(tuple(scores))))
    return groups


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def build_learner(
    model: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    algorithm: GRPO | None = None,
    temperature: float = 1.0,
    **learner: object,
) -> PolicyLearner:
    """A learner rank in this process (one process group per process: use subprocesses for more ranks)."""
    if not torch.distributed.is_initialized():
        init_process_group(rank, ranks, "127.0.0.1", port or free_port(), "cpu")
    config = LearnerConfig(**{"learning_rate": 1e-3, "dtype": "float32", "ranks": ranks, **learner})  # type: ignore[arg-type]
    return PolicyLearner(
        model,
        config,
        algorithm or GRPO(GRPO.Config(samples_per_prompt=4)),
        device="cpu",
        temperature=temperature,
        total_steps=10,
    )


def grpo_advantages(groups: list[Group]) -> Advantages:
    """What GRPO with its defaults makes of scored groups."""
    return GRPO(GRPO.Config(samples_per_prompt=4)).advantages(Experience(groups, step=1))


def smooth_steps(learner: PolicyLearner) -> PolicyLearner:
    """Adam's step is nearly the gradient's sign, which rounding can flip; a large epsilon makes it comparable."""
    for group in torch_optimizer(learner).param_groups:
        group["eps"] = 0.1
    return learner


def torch_optimizer(learner: PolicyLearner) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers."""
    return guarded_adamw(learner.engine.optimizer)


def weights_of(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    """Copies of all weights under their Hugging Face names (all ranks call it)."""
    return {name: tensor.clone() for name, tensor in learner.named_weights()}
