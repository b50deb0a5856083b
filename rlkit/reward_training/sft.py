"""Supervised fine-tuning on a data source's reference answers, for `python -m rlkit.sft`."""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.config.command import print_error
from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError, ConfigIssue
from rlkit.config.parts import ResolvedRun
from rlkit.data.base import BadRow
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.experience import UserError
from rlkit.reward_training.ranks import FAILED, RankHangsError, join_ranks, naming_a_hang, run_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlkit.data.base import Problem
    from rlkit.reward_training.sft_learner import Example

log = logging.getLogger(__name__)

LIMIT = "trainer.step_timeout_seconds"
USED = {
    "seed": "seeds the order of the problems and the choice among their references",
    "run_dir": "gets `policy/` (a Hugging Face folder), metrics.jsonl and summary.json",
    "dry_run": "validate only",
    "data": "the problems; each needs at least one reference answer",
    "model": "the model to start from",
    "learner": "optimizer, schedule, ranks, ZeRO stage and tokens per micro-batch",
    "cluster": "`cluster.device` and `cluster.threads_per_actor`",
    "trainer.total_steps": "optimizer steps",
    "trainer.prompts_per_step": "problems per optimizer step",
    "trainer.evaluate_every_steps": "steps between held-out losses, besides before and after; 0: only those",
    "trainer.evaluation_prompts": "held-out problems per evaluation",
    LIMIT: "with several ranks: how long one may keep the others waiting",
    "rollout.max_prompt_tokens": "longer prompts are skipped and counted",
    "rollout.max_response_tokens": "longer references are skipped and counted",
}
"""Key or group -> its meaning to this command."""

PROGRESS_EVERY_SECONDS = 5.0


class SftError(UserError): ...


def fine_tune(resolved: ResolvedRun) -> int:
    config = resolved.config
    return run_ranks(config.learner.ranks, config.trainer.step_timeout_seconds, LIMIT, _train_rank, resolved)


def load(arguments: Sequence[str]) -> ResolvedRun:
    """Raise ConfigError, also for a key that has no effect here."""
    refused = []
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key not in USED and key.partition(".")[0] not in USED and key not in ("rollout", "trainer"):
            refused.append(ConfigIssue(argument, f"has no effect in rlkit.sft; what has: {', '.join(USED)}"))
    if refused:
        raise ConfigError(refused)
    # No reward is used; this one asks for nothing but an answer.
    resolved = load_config([*arguments, "reward=rule"], starts=False)
    if "references" not in resolved.make_data_source().provides():
        raise ConfigError([ConfigIssue("data", "has no reference answers; for data=jsonl name their column")])
    if resolved.config.cluster.device == "cpu" and resolved.config.learner.ranks > 1:
        log.info("ranks on one CPU share its cores")
    return resolved


def _train_rank(rank: int, port: int, resolved: ResolvedRun) -> int:
    config, ranks = resolved.config, resolved.config.learner.ranks
    seconds, cluster = config.trainer.step_timeout_seconds, config.cluster
    try:
        with naming_a_hang(rank, ranks, seconds, LIMIT):
            join_ranks(rank, ranks, port, cluster.device, cluster.threads_per_actor, config.seed, seconds)
            train(resolved, rank)
    except UserError as error:
        return print_error(error) if rank == 0 or isinstance(error, RankHangsError) else FAILED
    return 0


def train(resolved: ResolvedRun, rank: int = 0) -> dict[str, Any]:
    """Needs an initialised process group; returns the summary that rank 0 writes."""
    from rlkit.data.rendering import load_tokenizer
    from rlkit.models.folder import model_folder
    from rlkit.reward_training.sft_learner import SupervisedLearner

    config, started = resolved.config, time.monotonic()
    path = model_folder(config.model.path)
    tokenizer = load_tokenizer(path, config.model.trust_remote_code)
    train_examples = _load_examples(resolved, "train", tokenizer)
    heldout = _load_examples(resolved, "heldout", tokenizer)[: config.trainer.evaluation_prompts]
    learner = SupervisedLearner(
        path,
        config.learner,
        device=config.cluster.device,
        total_steps=config.trainer.total_steps,
        trust_remote_code=config.model.trust_remote_code,
    )
    report = _Report(config.run_dir, rank == 0)
    judged = [references[0] for references in heldout]
    before = learner.evaluate(judged)
    report(step=0, heldout_loss=before)
    after, loss, every = before, before, config.trainer.evaluate_every_steps
    batches = draw_batches(train_examples, config.trainer.prompts_per_step, config.seed)
    for step in range(1, config.trainer.total_steps + 1):
        loss = learner.step(next(batches))
        last = step == config.trainer.total_steps
        if last or (every and step % every == 0):
            after = learner.evaluate(judged)
            report(step=step, loss=loss, heldout_loss=after)
        else:
            report(step=step, loss=loss)
    folder = config.run_dir / "policy"
    learner.save(folder)
    summary = {
        "steps": config.trainer.total_steps,
        "loss": loss,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        "wall_seconds": time.monotonic() - started,
        "policy": str(folder),
    }
    if rank == 0:
        _with_template(tokenizer, config.model.chat_template).save_pretrained(folder)
        (config.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"saved {folder}; held-out loss {before:.4f} -> {after:.4f}")
    return summary


class _Report:
    def __init__(self, run_dir: Path, active: bool) -> None:
        self._active, self._printed = active, 0.0
        if active:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = run_dir / "metrics.jsonl"
            self._file.write_text("")

    def __call__(self, **values: float) -> None:
        if not self._active:
            return
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")
        if "heldout_loss" in values or time.monotonic() - self._printed > PROGRESS_EVERY_SECONDS:
            self._printed = time.monotonic()
            print(
                "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()), flush=True
            )


def _load_examples(resolved: ResolvedRun, split: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
    problems, bad = resolved.make_data_source().load(split)
    rollout, model = resolved.config.rollout, resolved.config.model
    examples, more_bad = make_examples(
        problems,
        tokenizer,
        rollout.max_prompt_tokens,
        rollout.max_response_tokens,
        model.chat_template,
        model.chat_template_arguments,
    )
    unusable = [*bad, *more_bad]
    rows = len(problems) + len(bad)
    refuse_too_many_bad_rows(unusable, rows, resolved.data_config.max_bad_row_share, f"data, {split} rows")
    if unusable:
        first = f"{unusable[0].origin}: {unusable[0].reason}"
        print(f"{split}: {len(unusable)} of {rows} rows skipped, the first: {first}", file=sys.stderr)
    return examples


def make_examples(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    max_target_tokens: int,
    chat_template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> tuple[list[list[Example]], list[BadRow]]:
    """Per usable problem one example for each reference; and the unusable rows.

    The target is the reference and the end-of-sequence token, tokenised apart from the prompt, as a sampler ends it.
    """
    from rlkit.data.rendering import render
    from rlkit.reward_training.sft_learner import Example

    prompts, bad = render(problems, tokenizer, max_prompt_tokens, chat_template, template_arguments)
    if tokenizer.eos_token_id is None:
        raise SftError("the tokenizer has no end-of-sequence token; without one the model never learns to stop")
    texts = [reference for prompt in prompts for reference in prompt.references]
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    longest = 1 + max(map(len, token_ids), default=0)
    encoded = iter(token_ids)
    examples: list[list[Example]] = []
    for prompt in prompts:
        targets = [(*next(encoded), tokenizer.eos_token_id) for _ in prompt.references]
        usable = [Example(prompt.token_ids, target) for target in targets if len(target) <= max_target_tokens]
        if usable:
            examples.append(usable)
        else:
            why, remedy = "it has no reference", ""
            if targets:
                why = f"every reference has more than {max_target_tokens} tokens"
                remedy = f"Raise rollout.max_response_tokens (the longest has {longest})"
            bad.append(BadRow(prompt.id, why, remedy))
    return examples, bad


def draw_batches(examples: Sequence[Sequence[Example]], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches: problems shuffled in each epoch, one reference drawn for each."""
    rng = random.Random(seed)
    queue: list[int] = []
    while True:
        batch: list[Example] = []
        while len(batch) < size:
            if not queue:
                queue = rng.sample(range(len(examples)), len(examples))
            batch.append(rng.choice(examples[queue.pop()]))
        yield batch


def _with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    return tokenizer
