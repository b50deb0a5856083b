"""Check that the chosen diagnostics can report something in this run."""

from __future__ import annotations

from algorithms.base import Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import Part
from rlkit.config.plan import asks_reward, has_engines
from rlkit.config.schema import EvaluationConfig, LearnerConfig, RolloutConfig, TrainerConfig
from rlkit.data.base import DataSource
from rlkit.diagnostics.base import DiagnosticConfig, RunFacts
from rlkit.diagnostics.known import diagnostic_class


def diagnostics_act(
    diagnostics: tuple[DiagnosticConfig, ...],
    trainer: TrainerConfig,
    learner: LearnerConfig,
    rollout: RolloutConfig,
    evaluation: EvaluationConfig,
    algorithm: Algorithm,
    reward: Part,
    verifier: Part,
    data: DataSource,
    typed: frozenset[str],
) -> Issues:
    sections = {"trainer": trainer, "learner": learner, "algorithm": algorithm.config}
    asked = asks_reward(rollout, algorithm)
    facts = RunFacts(
        settings={name: section.model_dump(mode="json") for name, section in sections.items()},
        needs=algorithm.needs(),
        reward=reward.cls.traits(reward.config) if asked else None,
        verified=evaluation.training_answers
        and has_engines(rollout, evaluation)
        and rollout.source != "model"
        and not (asked and reward == verifier),
        columns=frozenset(data.provides()),
    )
    for config in diagnostics:
        for objection in diagnostic_class(config.kind).objections(config, facts):
            yield ConfigIssue("diagnostics", f"{config.name}: {objection}")
    if "trainer.hacking_alarm_steps" in typed and "hacking" not in [config.name for config in diagnostics]:
        yield ConfigIssue("trainer.hacking_alarm_steps", "has no effect: `hacking` is not among the diagnostics")
