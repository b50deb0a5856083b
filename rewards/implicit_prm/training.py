"""`reward=implicit_prm` of `rlkit.train_reward`: trains the implicit PRM on outcome labels (arXiv 2412.01981)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rewards.implicit_prm.config import PAIRED
from rlkit.data.base import BadRow, DataConfig, DataError
from rlkit.data.rendering import load_tokenizer
from rlkit.data.rows import refuse_too_many_bad_rows
from rlkit.experience.section import LearningRate
from rlkit.experience.steps import StepStyle
from rlkit.models.folder import PREFIX, ModelFolderError, check_model_folder, model_folder
from rlkit.reward_training.base import Report, RewardTraining, RewardTrainingConfig, Stage
from rlkit.reward_training.loop import Task, named, train
from rlkit.reward_training.outcomes import OutcomeData, Rollout, load_rollouts, split_rollouts, without
from rlkit.reward_training.rows import draw_batches

if TYPE_CHECKING:
    import numpy as np

    from rewards.implicit_prm.learner import Encoded, PrmLearner

NOTE = "implicit_prm.json"
"""File next to the trained model; it names the reference of the log-ratios."""


class ImplicitPRMTraining(RewardTraining):
    """Trains pi_phi so that sigma(beta * log(pi_phi / pi_ref)) of a response is the probability that it is right."""

    class Config(RewardTrainingConfig):
        """Defaults are those of the published recipe: one epoch, batch 64, cosine decay to 10 %, 3 % warm-up."""

        reference_path: str | None = None
        """Folder of pi_ref, which never changes. null: training uses `model_path`; evaluation uses the reference that
        `model_path` was trained against."""
        learning_rate: LearningRate = 5e-7
        """Peak learning rate of AdamW. The default suits models of billions of parameters."""
        objective: Literal["ce", "dpo", "nca", "kto"] = "ce"
        """ce: each response against its label, which may be soft; dpo, nca: pairs of a better and a worse response to
        one prompt (`batch_size` counts pairs); kto: unpaired."""
        beta: float = Field(default=0.05, gt=0)
        """Scale of the log-ratios in the objective."""
        balance: Literal["none", "prompt"] = "none"
        """prompt: keep equal numbers of right and wrong responses per prompt (a prompt with only one kind is left
        out)."""
        max_tokens: int | None = Field(default=None, ge=2)
        """Limit of prompt plus response in tokens; longer rows are bad rows. null: the model's limit."""
        coefficient: float = Field(default=0.001, gt=0)
        """Scale of the log-ratios in step scores when choosing responses; matters for votes and for `threshold`."""
        step_style: StepStyle = "auto"
        """Steps of a response. lines; numbered: by marks like `Step 3:`; blank_line: separated by blank lines; auto:
        numbered if there is such a mark, else lines."""
        threshold: float | None = Field(default=None, ge=0, le=1)
        """ProcessBench: the first step whose sigma(cumulative score) is below this is wrong. null: the threshold that
        is best for the evaluated rows themselves."""

        @model_validator(mode="after")
        def _balance_has_effect(self) -> ImplicitPRMTraining.Config:
            if self.balance != "none" and self.objective in PAIRED:
                raise ValueError(
                    f"balance={self.balance} has no effect with objective={self.objective}: pairs are even"
                )
            return self

    Data: ClassVar[type[DataConfig]] = OutcomeData
    stages: ClassVar[tuple[Stage, ...]] = ("train", "evaluate")

    @classmethod
    def check(cls, config: Any, data: Any) -> list[str]:
        messages = super().check(config, data)
        if config.reference_path is not None:
            try:
                check_model_folder(config.reference_path)
            except ModelFolderError as error:
                messages.append(f"reward.reference_path={config.reference_path}: {error}")
        return messages

    def run(self, report: Report) -> dict[str, Any]:
        return self._evaluate(report) if self.context.stage == "evaluate" else self._train(report)

    def _train(self, report: Report) -> dict[str, Any]:
        from rewards.implicit_prm.evaluation import outcome_metrics
        from rewards.implicit_prm.learner import make_examples

        config, seed = self.config, self.context.seed
        responses, heldout = self._read(report)
        paired = config.objective in PAIRED
        examples = make_examples(responses, paired, config.balance, seed)
        judged = make_examples(heldout, paired, "none", 0)
        if not examples:
            missing = "prompt has a better and a worse response" if paired else "prompt has right and wrong responses"
            raise DataError(f"data.path={self.data.path}: no training {missing}; objective=ce, balance=none need none")
        steps = config.total_steps(len(examples))
        report.phase(
            f"loading the models ({len(examples)} {'pairs' if paired else 'responses'}, {steps} steps; "
            f"{len(heldout)} responses held out)"
        )
        learner = self._learner(steps)
        ratios: list[np.ndarray] = []

        def measure() -> dict[str, float]:
            ratios[:] = learner.scorer.log_ratios(heldout)
            metrics = outcome_metrics(heldout, ratios, config.beta)
            if judged and config.objective != "ce":
                metrics["loss"] = learner.evaluate(heldout, judged)
            return metrics

        task = Task(
            batches=draw_batches([[example] for example in examples], config.batch_size, seed, across_epochs=False),
            step=lambda batch: {"prm/loss": learner.step(responses, batch)},
            measure=measure,
            save=lambda folder: self._save(learner, folder),
            heldout="prm/heldout_{}",
        )
        course = train(task, steps, config.evaluate_every_steps, report, self.context.model_folder)
        return {
            "steps": steps,
            "examples": len(examples),
            "loss_first": course.steps[0]["prm/loss"],
            "loss_last": course.steps[-1]["prm/loss"],
            "before": named(task.heldout, course.before),
            "after": named(task.heldout, course.after),
            **self._choices(report, heldout, ratios),
            "model": str(self.context.model_folder),
        }

    def _evaluate(self, report: Report) -> dict[str, Any]:
        config = self.config
        reference_path = config.reference_path or _noted_reference(config.model_path)
        report.phase("reading data")
        encoded = self._encode(*load_rollouts(self.data), report)
        report.phase(f"scoring {len(encoded)} responses against {reference_path}")
        import torch

        from rewards.implicit_prm.evaluation import outcome_metrics
        from rewards.implicit_prm.learner import PrmScorer, load_reference
        from rlkit.models.policy import load_causal_lm, resolve_dtype

        device, trust = self.context.device, config.trust_remote_code
        learner_config = config.learner(1, device)
        dtype: torch.dtype = resolve_dtype(config.dtype, device)
        policy = load_causal_lm(model_folder(config.model_path), dtype, trust_remote_code=trust).to(device)
        reference = load_reference(model_folder(reference_path), learner_config, device, trust)
        ratios = PrmScorer(policy, reference, learner_config, device).log_ratios(encoded)
        metrics = named("prm/{}", outcome_metrics(encoded, ratios, config.beta))
        report.evaluation(0, **metrics)
        choices = self._choices(report, encoded, ratios)
        return {"responses": len(encoded), "reference": reference_path, "metrics": metrics, **choices}

    # -- inside --------------------------------------------------------------------------------------------------

    def _read(self, report: Report) -> tuple[list[Encoded], list[Encoded]]:
        report.phase("reading data")
        rollouts, bad = load_rollouts(self.data)
        if not self.data.has_heldout_rows:
            train, heldout = split_rollouts(rollouts, self.data)
            return self._encode(train, bad, report), self._encode(heldout, [], report)
        heldout, heldout_bad = load_rollouts(self.data, "heldout")
        train, asked = without(rollouts, heldout)
        return self._encode(train, bad + asked, report), self._encode(heldout, heldout_bad, report)

    def _encode(self, rollouts: Sequence[Rollout], bad: list[BadRow], report: Report) -> list[Encoded]:
        from rewards.implicit_prm.learner import encode

        folder = model_folder(self.config.model_path)
        limit = check_model_folder(self.config.model_path).max_positions
        limits = [one for one in (self.config.max_tokens, limit) if one is not None]
        tokenizer = load_tokenizer(folder, self.config.trust_remote_code)
        encoded, more = encode(rollouts, tokenizer, min(limits, default=None), self.config.step_style)
        left_out = bad + more
        refuse_too_many_bad_rows(
            left_out, len(encoded) + len(left_out), self.data.max_bad_row_share, "the responses of the data"
        )
        if left_out:
            shown = "; ".join(f"{row.origin}: {row.reason}" for row in left_out[:3])
            report.warn(f"{len(left_out)} of {len(encoded) + len(left_out)} responses left out: {shown}")
        return encoded

    def _learner(self, steps: int) -> PrmLearner:
        from rewards.implicit_prm.learner import PrmLearner

        config, path = self.config, model_folder(self.config.model_path)
        return PrmLearner(
            path,
            path if config.reference_path is None else model_folder(config.reference_path),
            config.learner(steps, self.context.device),
            objective=config.objective,
            beta=config.beta,
            device=self.context.device,
            total_steps=steps,
            trust_remote_code=config.trust_remote_code,
        )

    def _choices(self, report: Report, encoded: Sequence[Encoded], ratios: list[np.ndarray]) -> dict[str, Any]:
        from rewards.implicit_prm import evaluation

        config = self.config
        report.samples(evaluation.sample_rows(encoded, ratios, config.beta))
        table = evaluation.selection_accuracy(encoded, ratios, config.coefficient, self.context.seed)
        report.text(evaluation.selection_table(table))
        choices: dict[str, Any] = {"choices": table}
        result = evaluation.first_error_result(encoded, ratios, config.coefficient, config.threshold)
        if result is not None:
            tuned = "tuned on these rows" if config.threshold is None else "given"
            report.text(
                f"ProcessBench F1 {100 * result.f1:.1f} (first wrong step found: {100 * result.error_accuracy:.1f} %, "
                f"all right recognised: {100 * result.correct_accuracy:.1f} %; "
                f"threshold {result.threshold:.6f}, {tuned})"
            )
            choices["process_bench"] = {
                "f1": result.f1,
                "error_accuracy": result.error_accuracy,
                "correct_accuracy": result.correct_accuracy,
                "threshold": result.threshold,
                "threshold_tuned_here": config.threshold is None,
            }
        return choices

    def _save(self, learner: PrmLearner, folder: Path) -> None:
        config = self.config
        learner.save(folder)
        if self.context.rank:
            return
        load_tokenizer(model_folder(config.model_path), config.trust_remote_code).save_pretrained(folder)
        reference = config.reference_path or config.model_path
        kept = reference if reference.startswith(PREFIX) else str(model_folder(reference))
        note = {"reference_path": kept, "beta": config.beta, "objective": config.objective}
        (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def _noted_reference(model_path: str) -> str:
    """Return the reference that a model was trained against. Raise DataError if it is not known."""
    file: Path = model_folder(model_path) / NOTE
    if not file.is_file():
        raise DataError(f"reward.reference_path: {model_path} has no {NOTE}, so name the model it was trained against")
    return str(json.loads(file.read_text())["reference_path"])
