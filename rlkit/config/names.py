"""The name that was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

# What other frameworks call a thing, by last component of the key.
OTHER_NAMES = {
    "batch_size": "trainer.prompts_per_step",
    "rollout_batch_size": "trainer.prompts_per_step",
    "train_batch_size": "trainer.prompts_per_step",
    "beta": "algorithm.kl_coefficient",
    "entropy_coef": "algorithm.entropy_coefficient",
    "kl_beta": "algorithm.kl_coefficient",
    "kl_coef": "algorithm.kl_coefficient",
    "kl_loss_coef": "algorithm.kl_coefficient",
    "clip_eps": "algorithm.clip_low",
    "clip_ratio": "algorithm.clip_low",
    "epsilon": "algorithm.clip_low",
    "gradient_clipping": "learner.max_grad_norm",
    "group_size": "algorithm.samples_per_prompt",
    "n": "algorithm.samples_per_prompt",
    "n_samples_per_prompt": "algorithm.samples_per_prompt",
    "num_generations": "algorithm.samples_per_prompt",
    "lr": "learner.learning_rate",
    "lr_scheduler": "learner.schedule",
    "max_completion_length": "rollout.max_response_tokens",
    "max_new_tokens": "rollout.max_response_tokens",
    "max_prompt_length": "rollout.max_prompt_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_steps": "trainer.total_steps",
    "num_steps": "trainer.total_steps",
    "model_name_or_path": "model.path",
    "model_path": "model.path",
    "output_dir": "run_dir",
    "ppo_mini_batch_size": "learner.minibatches_per_step",
    "num_minibatches": "learner.minibatches_per_step",
    "save_freq": "trainer.save_every_steps",
    "save_steps": "trainer.save_every_steps",
    "eval_steps": "trainer.evaluate_every_steps",
    "test_freq": "trainer.evaluate_every_steps",
    "tp": "rollout.tensor_parallel_size",
    "world_size": "learner.ranks",
}


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The valid name that looks most like `name`, None if none does."""
    spelled = {candidate.lower(): candidate for candidate in valid}
    found = get_close_matches(name.lower(), spelled, n=1, cutoff=cutoff)
    found += [candidate for candidate in sorted(spelled) if len(name) > 1 and name.lower() in candidate]
    return spelled[found[0]] if found else None


def did_you_mean(name: str, valid: Collection[str]) -> str:
    """`did you mean X? available: ...`, for a name that must be one of a few."""
    guess = nearest(name, valid)
    listed = f"available: {', '.join(sorted(valid))}" if valid else "none is available"
    return f"did you mean {guess}? {listed}" if guess else listed


def similar_keys(key: str, valid: Collection[str]) -> list[str]:
    """Full keys that were probably meant by the unknown `key`, best first, at most three.

    In this order: what other frameworks call it; the same field in another section; a field of the same section
    that looks like it; a field that contains it as a word; anything that looks like it.
    """
    section, _, leaf = key.rpartition(".")
    leaves = {full: full.rpartition(".")[2] for full in valid}
    exact = [full for full, own in leaves.items() if own == leaf]
    if exact:
        return exact[:3]
    meant = OTHER_NAMES.get(leaf, "")
    if meant in valid:
        return [meant]
    elsewhere = [full for full, own in leaves.items() if own == meant.rpartition(".")[2]]
    if elsewhere:
        return elsewhere[:3]
    within = {own: full for full, own in leaves.items() if section and full == f"{section}.{own}"}
    close = get_close_matches(leaf, within, n=1, cutoff=0.6)
    if close:
        return [within[close[0]]]
    anywhere = get_close_matches(leaf, set(leaves.values()), n=1, cutoff=0.75)
    if anywhere:
        return [full for full, own in leaves.items() if own == anywhere[0]][:3]
    words = [full for full, own in leaves.items() if len(leaf) > 1 and set(leaf.split("_")) <= set(own.split("_"))]
    inside_first = sorted(words, key=lambda full: not full.startswith(f"{section}."))
    return inside_first[:3] or get_close_matches(key, valid, n=1, cutoff=0.75)
