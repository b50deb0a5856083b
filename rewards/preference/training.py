"""`reward=preference` of `rlkit.train_reward`: trains a Bradley-Terry reward model on preference pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rewards.preference.inputs import (
    LONGEST_INPUT,
    ClassifierError,
    Encoder,
    Unreadable,
    check_classifier,
    positions,
)
from rlkit.data.base import DataError
from rlkit.experience.section import LearningRate
from rlkit.models.folder import model_folder
from rlkit.reward_training.base import Report, RewardTraining, RewardTrainingConfig, Stage
from rlkit.reward_training.loop import Task, named, train, warn_of
from rlkit.reward_training.pairs import Pair, PairRows, all_pairs, load_pairs
from rlkit.reward_training.rows import draw_batches

if TYPE_CHECKING:
    from rewards.preference.learner import EncodedPair, PreferenceLearner

SAMPLES = 20
"""Number of held-out pairs in samples.jsonl: those with the lowest chosen - rejected."""


class PreferenceTraining(RewardTraining):
    """Trains a sequence classifier so that chosen responses score above rejected ones (Bradley-Terry)."""

    class Config(RewardTrainingConfig):
        learning_rate: LearningRate = 1e-5
        """Peak learning rate of AdamW."""
        centring: float = Field(default=0.0, ge=0)
        """Weight of (chosen + rejected)^2, which keeps scores around zero (0.01 is usual)."""
        chat_template: str | None = None
        """Path of a Jinja chat template that replaces the tokenizer's own; saved with the model."""
        max_length: int | None = Field(default=None, ge=1)
        """Limit of prompt plus response, in tokens; longer pairs are skipped and counted. null: the model's limit."""

    Data: ClassVar[type[PairRows]] = PairRows
    stages: ClassVar[tuple[Stage, ...]] = ("train", "evaluate")

    @classmethod
    def check(cls, config: Any, data: Any) -> list[str]:
        messages = super().check(config, data)
        if config.trust_remote_code:
            messages.append("reward.trust_remote_code: reward=preference never runs a model folder's code")
        if messages:
            return messages
        model = json.loads((model_folder(config.model_path) / "config.json").read_text())
        labels = len(model["id2label"]) if "id2label" in model else model.get("num_labels")
        if (model.get("architectures") or [""])[0].endswith("ForSequenceClassification") and labels not in (1, None):
            messages.append(f"reward.model_path={config.model_path}: has {labels} labels; a preference model has one")
        limit = model.get("max_position_embeddings")
        if config.max_length is not None and limit is not None and config.max_length > limit:
            messages.append(f"reward.max_length={config.max_length}: is more than the model takes ({limit})")
        return messages

    def run(self, report: Report) -> dict[str, Any]:
        return self._evaluate(report) if self.context.stage == "evaluate" else self._train(report)

    def _train(self, report: Report) -> dict[str, Any]:
        config, seed = self.config, self.context.seed
        report.phase("reading data")
        train_rows, heldout_rows, bad = load_pairs(self.data, seed)
        warn_of(bad, report)
        encoder = self._encoder()
        prompts, heldout = self._encoded(train_rows, encoder, report), self._encoded(heldout_rows, encoder, report)
        pairs = sum(map(len, prompts))
        judged = [pair for prompt in heldout for pair in prompt]
        steps = config.total_steps(pairs)
        report.phase("loading the model")
        learner = self._learner(encoder, steps)
        course = train(
            Task(
                batches=draw_batches(prompts, config.batch_size, seed),
                step=lambda batch: named("preference/{}", learner.step(batch)),
                measure=lambda: learner.measure(judged),
                save=learner.save,
            ),
            steps,
            config.evaluate_every_steps,
            report,
            self.context.model_folder,
        )
        report.samples(self._samples(judged, learner))
        return {
            "steps": steps,
            "training_pairs": pairs,
            "heldout_pairs": len(judged),
            "bad_rows": len(bad),
            **named("before/{}", course.before),
            **named("after/{}", course.after),
            "model": str(self.context.model_folder),
        }

    def _evaluate(self, report: Report) -> dict[str, Any]:
        from rewards.preference.learner import measure_folder
        from rlkit.models.forward import ModelLoadError

        report.phase("reading data")
        rows, bad = all_pairs(self.data, self.context.seed)
        warn_of(bad, report)
        folder = model_folder(self.config.model_path)
        try:
            check_classifier(folder)
            encoder = self._encoder()
            pairs = [pair for prompt in self._encoded(rows, encoder, report) for pair in prompt]
            report.phase("scoring")
            measures = measure_folder(folder, encoder, pairs, self.config, self.context)
        except ClassifierError as error:
            raise ModelLoadError(str(error)) from error
        report.evaluation(0, **named("heldout/{}", measures))
        return {"pairs": len(pairs), "bad_rows": len(bad), **measures}

    def _encoder(self) -> Encoder:
        from rlkit.models.forward import ModelLoadError

        folder = model_folder(self.config.model_path)
        room = positions(json.loads((folder / "config.json").read_text()))
        longest = min(self.config.max_length or LONGEST_INPUT, room)
        try:
            return Encoder(folder, "chat", self.config.chat_template, longest)
        except ClassifierError as error:
            raise ModelLoadError(str(error)) from error

    def _learner(self, encoder: Encoder, steps: int) -> PreferenceLearner:
        from rewards.preference.learner import PreferenceLearner

        return PreferenceLearner(
            model_folder(self.config.model_path),
            encoder.tokenizer,
            self.config.learner(steps, self.context.device),
            device=self.context.device,
            total_steps=steps,
            centring=self.config.centring,
            chat_template=encoder.template,
        )

    def _encoded(self, prompts: Sequence[Sequence[Pair]], encoder: Encoder, report: Report) -> list[list[EncodedPair]]:
        """Encode pairs, leaving out those that the model cannot read. Raise DataError if these are too many."""
        from rewards.preference.learner import EncodedPair

        encoded: list[list[EncodedPair]] = []
        reasons: list[str] = []
        for pairs in prompts:
            usable = []
            for pair in pairs:
                try:
                    chosen, rejected = (encoder.encode(pair.prompt, text).ids for text in (pair.chosen, pair.rejected))
                except Unreadable as error:
                    reasons.append(f"{pair.origin}: {error}")
                    continue
                usable.append(EncodedPair(pair, chosen, rejected))
            if usable:
                encoded.append(usable)
        total = sum(map(len, prompts))
        if reasons:
            report.warn(f"{len(reasons)} of {total} pairs cannot be read, the first: {reasons[0]}")
        if len(reasons) > self.data.max_bad_row_share * total or not encoded:
            raise DataError(
                f"{len(reasons)} of {total} pairs cannot be read by the model, the first: {reasons[0]}; allow more "
                f"with data.max_bad_row_share={len(reasons) / total + 0.005:.2f}, or shorten them"
            )
        return encoded

    def _samples(self, judged: Sequence[EncodedPair], learner: PreferenceLearner) -> Iterator[dict[str, Any]]:
        chosen, rejected = learner.scores(judged)
        for i in sorted(range(len(judged)), key=lambda i: float(chosen[i] - rejected[i]))[:SAMPLES]:
            pair = judged[i].pair
            yield {
                "prompt": [{"role": message.role, "content": message.content} for message in pair.prompt],
                "chosen": pair.chosen,
                "chosen_score": float(chosen[i]),
                "rejected": pair.rejected,
                "rejected_score": float(rejected[i]),
            }
