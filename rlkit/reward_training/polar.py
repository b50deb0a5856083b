"""`reward=polar`: a POLAR discriminator, from a pool of policies to a reward (arXiv 2507.05197).

stage=generate samples the pool; stage=pretrain tells its policies apart (equation 7); stage=finetune tells right from
wrong (equation 8); stage=evaluate measures. Pre-training and fine-tuning differ in nothing but the triplets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rewards.polar.serialise import SerialisationError, Wrapper
from rlkit.data.base import BadRow, DataError
from rlkit.polar_training.generate import Generation, pool_report
from rlkit.polar_training.rows import Asked, Form, PolarRows, read, read_split
from rlkit.polar_training.triplets import write_triplets
from rlkit.reward_training.base import Report, RewardTraining, RewardTrainingConfig, Stage

if TYPE_CHECKING:
    from rlkit.polar_training.learner import PolarLearner

FORMS: dict[str, Form] = {"generate": "prompts", "pretrain": "trajectories", "finetune": "triplets"}
"""What a stage reads where data.form does not say."""
ACTS_IN = {"generation": ("generate",), "across_styles": ("pretrain", "evaluate"), "heldout_policies": ("pretrain",)}
"""Option -> the stages that it has an effect in."""
WARNED_ROWS = 10
"""Unusable rows that are named one by one."""


class PolarConfig(RewardTrainingConfig):
    """Defaults are the paper's for fine-tuning; rlkit.polar_training.scaling has its laws for pre-training."""

    model_path: str = "embedded:policy"
    """A language model (its head then starts at zero), or a discriminator: pre-trained, or to be evaluated."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    batch_size: int = Field(default=320, ge=1)
    """Triplets per optimizer step."""
    tokens_per_microbatch: int = Field(default=32768, ge=1)
    """Tokens that one forward and backward pass takes; what the candidates of a prompt share counts once."""
    wrapper: Wrapper = "sft"
    """Between prompt and response: a line break (sft), or nothing (pretrain: the response continues the prompt). The
    reward that uses the model must say the same."""
    max_length: int | None = Field(default=None, ge=16)
    """Tokens of the whole input; null: 16384, or what the model takes if that is less."""
    max_response_length: int | None = Field(default=None, ge=1)
    """Tokens of reference and candidate each, cut on the right; null: a quarter of max_length."""
    across_styles: bool = False
    """stage=pretrain and evaluate: compare policies of different styles, too. These are told apart at once, by style,
    and nothing else is learnt from them."""
    heldout_policies: tuple[str, ...] = ()
    """stage=pretrain: policies that are not trained on; same-versus-different accuracy is measured on them."""
    generation: Generation = Generation()
    """The pool of policies and how it is sampled."""


class PolarTraining(RewardTraining):
    """Trains a discriminator that scores how close a response is to a reference."""

    Config: ClassVar[type[RewardTrainingConfig]] = PolarConfig
    Data: ClassVar[type[PolarRows]] = PolarRows
    stages: ClassVar[tuple[Stage, ...]] = ("generate", "pretrain", "finetune", "evaluate")

    @classmethod
    def check(cls, config: Any, data: Any) -> list[str]:
        """Whether every policy of the pool has a folder, and the model takes what is asked for."""
        from rlkit.config.model_folder import ModelFolderError, check_model_folder

        messages = super().check(config, data)
        if config.trust_remote_code:
            messages.append("reward.trust_remote_code: reward=polar never runs a model folder's code")
        for name, folder in config.generation.policies.items():
            try:
                check_model_folder(folder)
            except ModelFolderError as error:
                messages.append(f"reward.generation.policies.{name}={folder}: {error}")
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                messages.append(f"reward.generation.policies.{name}: names are made of letters, digits, - _ and .")
        pool = len(config.generation.policies)
        if pool and config.generation.policies_per_prompt > pool:
            messages.append(
                f"reward.generation.policies_per_prompt={config.generation.policies_per_prompt}: the pool has {pool}"
            )
        unknown = sorted(set(config.generation.styles) - set(config.generation.policies))
        if unknown:
            messages.append(f"reward.generation.styles: {', '.join(unknown)} is no policy of the pool")
        return messages

    def run(self, report: Report) -> dict[str, Any]:
        """The stage's work. Raises DataError and ModelLoadError for the user."""
        self._refuse_what_has_no_effect()
        if self.context.stage == "generate":
            return self._generate(report)
        return self._evaluate(report) if self.context.stage == "evaluate" else self._train(report)

    def _evaluate(self, report: Report) -> dict[str, Any]:
        """All measures on all rows."""
        from rlkit.polar_training.measures import measure

        asked, bad = read(self.data, self._form)
        _warn(bad, report)
        learner = self._learner(1, report)
        measured = measure(learner, asked, _policies(asked), self.config.across_styles)
        if not measured:
            raise DataError(
                f"data.path={self.data.path}: nothing to measure: it has no triplets, no two responses of one policy "
                "beside another's, and no right and wrong responses to one prompt"
            )
        report.evaluation(0, **_named("heldout", measured))
        return {"prompts": len(asked), "bad_rows": len(bad), **measured}

    def _train(self, report: Report) -> dict[str, Any]:
        from rlkit.polar_training.measures import contrasts, measure, verdicts
        from rlkit.polar_training.pairs import batches_of_triplets, shuffled

        report.phase("reading data")
        asked, heldout, bad = read_split(self.data, self._form)
        _warn(bad, report)
        policies = [name for name in _policies(asked) if name not in self.config.heldout_policies]
        pretraining = self.context.stage == "pretrain"
        groups = contrasts(asked, policies, self.config.across_styles) if pretraining else verdicts(asked)
        triplets = [triplet for group in groups for triplet in group]
        if not triplets:
            raise DataError(f"data.path={self.data.path}: no triplet can be built: {_NEEDED[self.context.stage]}")
        judged = self.config.heldout_policies or policies
        steps = self.config.total_steps(len(triplets))
        learner = self._learner(steps, report)
        before = after = measure(learner, heldout, judged, self.config.across_styles)
        report.evaluation(0, **_named("heldout", before))
        report.begins(steps)
        every = self.config.evaluate_every_steps
        batches = batches_of_triplets(shuffled(groups, self.context.seed), self.config.batch_size)
        losses: list[float] = []
        for step in range(1, steps + 1):
            losses.append(learner.step(next(batches)))
            report(step, **{"polar/loss": losses[-1]})
            if step == steps or (every and step % every == 0):
                after = measure(learner, heldout, judged, self.config.across_styles)
                report.evaluation(step, **_named("heldout", after))
        learner.save(self.context.model_folder)
        if self.context.rank == 0:
            write_triplets(triplets, self.context.run_dir / "triplets.jsonl")
        counts = {"steps": steps, "triplets": len(triplets), "prompts": len(asked), "heldout_prompts": len(heldout)}
        return {
            "stage": self.context.stage,
            **counts,
            "bad_rows": len(bad),
            "first_loss": losses[0],
            "last_loss": sum(losses[-10:]) / len(losses[-10:]),
            **_named("before", before),
            **_named("after", after),
            "model": str(self.context.model_folder),
        }

    def _generate(self, report: Report) -> dict[str, Any]:
        from dataclasses import replace

        import torch

        from rlkit.data.rendering import load_tokenizer
        from rlkit.models.folder import model_folder
        from rlkit.polar_training.generate import generate, prefixes

        options: Generation = self.config.generation
        if len(options.policies) < 2:
            raise DataError("reward.generation.policies={NAME: FOLDER, ...}: stage=generate needs two or more")
        if self.config.ranks != 1:
            raise DataError("reward.ranks: stage=generate runs in one process (vLLM shares the work among prompts)")
        asked, bad = read(self.data, self._form)
        _warn(bad, report)
        if options.longest_prefix is not None:
            if options.prompts_as != "text":
                raise DataError("reward.generation.longest_prefix has no effect with prompts_as=chat")
            tokenizer = load_tokenizer(model_folder(self.config.model_path))
            cut = prefixes([each.prompt for each in asked], tokenizer, options.longest_prefix, self.context.seed)
            asked = [replace(each, prompt=prompt) for each, prompt in zip(asked, cut, strict=True)]
        work = self.context.run_dir / "policies"
        work.mkdir(parents=True, exist_ok=True)
        report.phase("sampling")
        rows = list(
            generate(
                asked,
                options,
                work,
                device=self.context.device,
                threads=torch.get_num_threads(),
                seed=self.context.seed,
                is_right=_is_right,
                said=report.text,
            )
        )
        file = self.context.run_dir / "trajectories.jsonl"
        with file.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        pool = pool_report(rows)
        for name, facts in pool.items():
            right = "" if facts["accuracy"] is None else f", {facts['accuracy']:.1%} right"
            report.text(f"{name}: {facts['responses']} responses, {facts['finished']:.1%} finished{right}")
        return {"stage": "generate", "prompts": len(asked), "trajectories": str(file), "pool": pool}

    @property
    def _form(self) -> Form:
        """What the rows are. Raises DataError for a form that the stage cannot use."""
        stage = self.context.stage
        form: Form = self.data.form or FORMS.get(stage, "triplets")
        usable = {"generate": ("prompts",), "pretrain": ("trajectories", "columns")}
        allowed = usable.get(stage, ("trajectories", "columns", "triplets"))
        if form not in allowed:
            raise DataError(f"data.form={form}: stage={stage} reads {' or '.join(allowed)}")
        return form

    def _refuse_what_has_no_effect(self) -> None:
        for name, stages in ACTS_IN.items():
            changed = getattr(self.config, name) != PolarConfig.model_fields[name].default
            if changed and self.context.stage not in stages:
                raise DataError(f"reward.{name} has no effect in stage={self.context.stage}")

    def _learner(self, steps: int, report: Report) -> PolarLearner:
        from rewards.polar.backends import DiscriminatorError
        from rewards.polar.reward import lengths
        from rlkit.models.folder import model_folder
        from rlkit.models.policy import ModelLoadError
        from rlkit.polar_training.learner import PolarLearner

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


def _policies(asked: Sequence[Asked]) -> list[str]:
    return sorted({trajectory.policy for each in asked for trajectory in each.trajectories})


def _warn(bad: Sequence[BadRow], report: Report) -> None:
    for row in bad[:WARNED_ROWS]:
        report.warn(f"skipped {row.origin}: {row.reason}")


def _is_right(asked: Asked, text: str) -> bool | None:
    """By the rule, where the gold response marks a plain number as its answer; None where that cannot be said."""
    from rewards.verifiers.math import compare_plain, final_answer

    gold = None if asked.reference is None else final_answer(asked.reference)
    if gold is None:
        return None
    found = final_answer(text)
    return False if found is None else compare_plain(found.text, gold.text)


def _named(area: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{area}/{name}": value for name, value in values.items()}
