"""`reward=polar` of `rlkit.train_reward`: from a pool of policies to a discriminator (arXiv 2507.05197).

stage=generate samples the pool; pretrain learns to tell its policies apart (eq. 7), finetune to tell right from wrong
(eq. 8); evaluate measures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rewards.polar.backends import DiscriminatorError
from rewards.polar.generation import Generation, generate, pool_report, prefixes
from rewards.polar.reward import lengths
from rewards.polar.serialise import SerialisationError, Wrapper
from rewards.polar.triplets import (
    Form,
    PolarRows,
    PromptRows,
    contrasts,
    read,
    read_split,
    verdicts,
    write_triplets,
)
from rlkit.data.base import DataError
from rlkit.data.rendering import load_tokenizer
from rlkit.experience.section import LearningRate
from rlkit.models.folder import model_folder
from rlkit.reward_training.base import Report, RewardTraining, RewardTrainingConfig, Stage
from rlkit.reward_training.loop import Task, named, train, warn_of
from rlkit.reward_training.rows import draw_batches

if TYPE_CHECKING:
    from rewards.polar.learner import PolarLearner

FORMS: dict[str, Form] = {"generate": "prompts", "pretrain": "trajectories", "finetune": "triplets"}
"""Stage -> the form that data.form=null stands for."""
ACTS_IN = {"generation": ("generate",), "across_styles": ("pretrain", "evaluate"), "heldout_policies": ("pretrain",)}
"""Option -> the stages in which it has an effect."""


class PolarTrainingConfig(RewardTrainingConfig):
    """Defaults are the paper's values for fine-tuning."""

    model_path: str = "embedded:policy"
    """A language model (its head then starts at zero), or a discriminator to train or evaluate."""
    learning_rate: LearningRate = 1e-5
    """Peak learning rate of AdamW."""
    batch_size: int = Field(default=320, ge=1)
    """Triplets per optimizer step."""
    tokens_per_microbatch: int = Field(default=32768, ge=1)
    """Tokens per forward and backward pass; tokens that a prompt's candidates share count once."""
    wrapper: Wrapper = "sft"
    """What is between prompt and response. sft: a line break; pretrain: nothing (the response continues the prompt).
    The reward that uses the model must have the same value."""
    max_length: int | None = Field(default=None, ge=16)
    """Limit of the whole input in tokens; null: 16384, or the model's limit if that is less."""
    max_response_length: int | None = Field(default=None, ge=1)
    """Limit in tokens of reference and candidate each, truncated on the right; null: a quarter of max_length."""
    across_styles: bool = False
    """stage=pretrain and evaluate: also compare policies of different styles. Style alone tells these apart, so nothing
    else is learnt from them."""
    heldout_policies: tuple[str, ...] = ()
    """stage=pretrain: policies that are not trained on; same-versus-different accuracy is measured on them."""
    generation: Generation = Generation()
    """The pool of policies and its sampling."""


class PolarTraining(RewardTraining):
    """Trains a discriminator that scores how close a response is to a reference."""

    Config: ClassVar[type[RewardTrainingConfig]] = PolarTrainingConfig
    Data: ClassVar[type[PolarRows]] = PolarRows
    stages: ClassVar[tuple[Stage, ...]] = ("generate", "pretrain", "finetune", "evaluate")

    @classmethod
    def check(cls, config: Any, data: Any) -> list[str]:
        messages = super().check(config, data)
        if config.trust_remote_code:
            messages.append("reward.trust_remote_code: reward=polar never runs a model folder's code")
        return [*messages, *config.generation.problems()]

    def run(self, report: Report) -> dict[str, Any]:
        self._refuse_what_has_no_effect()
        if self.context.stage == "generate":
            return self._generate(report)
        return self._evaluate(report) if self.context.stage == "evaluate" else self._train(report)

    def _evaluate(self, report: Report) -> dict[str, Any]:
        from rewards.polar.learner import measure

        prompts, bad = read(self.data, self._form)
        warn_of(bad, report)
        learner = self._learner(1, report)
        measures = measure(learner, prompts, _policies(prompts), self.config.across_styles)
        if not measures:
            raise DataError(
                f"data.path={self.data.path}: nothing to measure: it has no triplets, no two responses of one policy "
                "beside another's, and no right and wrong responses to one prompt"
            )
        report.evaluation(0, **named("heldout/{}", measures))
        return {"prompts": len(prompts), "bad_rows": len(bad), **measures}

    def _train(self, report: Report) -> dict[str, Any]:
        from rewards.polar.learner import measure

        config, stage = self.config, self.context.stage
        report.phase("reading data")
        prompts, heldout, bad = read_split(self.data, self._form)
        warn_of(bad, report)
        policies = [name for name in _policies(prompts) if name not in config.heldout_policies]
        groups = contrasts(prompts, policies, config.across_styles) if stage == "pretrain" else verdicts(prompts)
        triplets = [triplet for group in groups for triplet in group]
        if not triplets:
            raise DataError(f"data.path={self.data.path}: no triplet can be built: {_NEEDED[stage]}")
        judged = config.heldout_policies or policies
        steps = config.total_steps(len(triplets))
        learner = self._learner(steps, report)
        course = train(
            Task(
                batches=draw_batches(groups, config.batch_size, f"shuffled/{self.context.seed}"),
                step=lambda batch: {"polar/loss": learner.step(batch)},
                measure=lambda: measure(learner, heldout, judged, config.across_styles),
                save=learner.save,
            ),
            steps,
            config.evaluate_every_steps,
            report,
            self.context.model_folder,
        )
        if self.context.rank == 0:
            write_triplets(triplets, self.context.run_dir / "triplets.jsonl")
        losses = [metrics["polar/loss"] for metrics in course.steps]
        return {
            "stage": stage,
            "steps": steps,
            "triplets": len(triplets),
            "prompts": len(prompts),
            "heldout_prompts": len(heldout),
            "bad_rows": len(bad),
            "first_loss": losses[0],
            "last_loss": sum(losses[-10:]) / len(losses[-10:]),
            **named("before/{}", course.before),
            **named("after/{}", course.after),
            "model": str(self.context.model_folder),
        }

    def _generate(self, report: Report) -> dict[str, Any]:
        import torch

        options: Generation = self.config.generation
        if len(options.policies) < 2:
            raise DataError("reward.generation.policies={NAME: FOLDER, ...}: stage=generate needs two or more")
        if self.config.ranks != 1:
            raise DataError("reward.ranks: stage=generate runs in one process (vLLM shares the work among prompts)")
        prompts, bad = read(self.data, self._form)
        warn_of(bad, report)
        if options.longest_prefix is not None:
            if options.prompts_as != "text":
                raise DataError("reward.generation.longest_prefix has no effect with prompts_as=chat")
            tokenizer = load_tokenizer(model_folder(self.config.model_path))
            texts = [prompt.prompt for prompt in prompts]
            cut = prefixes(texts, tokenizer, options.longest_prefix, self.context.seed)
            prompts = [replace(prompt, prompt=text) for prompt, text in zip(prompts, cut, strict=True)]
        work = self.context.run_dir / "policies"
        work.mkdir(parents=True, exist_ok=True)
        report.phase("sampling")
        rows = list(
            generate(
                prompts,
                options,
                work,
                device=self.context.device,
                threads=torch.get_num_threads(),
                seed=self.context.seed,
                is_right=_is_right,
                say=report.text,
            )
        )
        file = self.context.run_dir / "trajectories.jsonl"
        with file.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        pool = pool_report(rows)
        for name, facts in pool.items():
            right = "" if facts["accuracy"] is None else f", {facts['accuracy']:.1%} right"
            report.text(f"{name}: {facts['responses']} responses, {facts['finished']:.1%} finished{right}")
        return {"stage": "generate", "prompts": len(prompts), "trajectories": str(file), "pool": pool}

    @property
    def _form(self) -> Form:
        stage = self.context.stage
        form: Form = self.data.form or FORMS.get(stage, "triplets")
        usable = {"generate": ("prompts",), "pretrain": ("trajectories", "columns")}
        allowed = usable.get(stage, ("trajectories", "columns", "triplets"))
        if form not in allowed:
            raise DataError(f"data.form={form}: stage={stage} reads {' or '.join(allowed)}")
        return form

    def _refuse_what_has_no_effect(self) -> None:
        for name, stages in ACTS_IN.items():
            changed = getattr(self.config, name) != PolarTrainingConfig.model_fields[name].default
            if changed and self.context.stage not in stages:
                raise DataError(f"reward.{name} has no effect in stage={self.context.stage}")

    def _learner(self, steps: int, report: Report) -> PolarLearner:
        from rewards.polar.learner import PolarLearner
        from rlkit.models.forward import ModelLoadError

        report.phase("loading the model")
        folder = model_folder(self.config.model_path)
        try:
            limits, _ = lengths(self.config, json.loads((folder / "config.json").read_text()))
            return PolarLearner(
                folder,
                self.config.learner(steps, self.context.device),
                device=self.context.device,
                total_steps=steps,
                limits=limits,
                wrapper=self.config.wrapper,
            )
        except (DiscriminatorError, SerialisationError) as error:
            raise ModelLoadError(str(error)) from error


_NEEDED = {
    "pretrain": "two responses of one policy and one of another, of one style, to one prompt",
    "finetune": "finished triplets, or right and wrong responses to one prompt (data.label_column, data.label_key) "
    "and a gold one (data.reference_column) or a second right one",
}


def _policies(prompts: Sequence[PromptRows]) -> list[str]:
    return sorted({trajectory.policy for prompt in prompts for trajectory in prompt.trajectories})


def _is_right(prompt: PromptRows, text: str) -> bool | None:
    """Whether a text is right; None unless the gold response marks a plain number as its answer."""
    from rewards.verifiers.answers import final_answer
    from rewards.verifiers.numerals import compare_plain

    gold = None if prompt.reference is None else final_answer(prompt.reference)
    if gold is None:
        return None
    answer = final_answer(text)
    return False if answer is None else compare_plain(answer.text, gold.text)
