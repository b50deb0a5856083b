"""Checks that environment, data, reward and sampling fit together."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from algorithms.base import Algorithm
from rlkit.config.messages import ConfigIssue, Issues
from rlkit.config.parts import Part, ResolvedRun
from rlkit.config.plan import longest_episode
from rlkit.config.schema import RolloutConfig
from rlkit.data.base import DataSource
from rlkit.environments.agent import Agent, may_have_segments
from rlkit.environments.tool import tools_of

NAMES = "environment=NAME, or environment._target_=my_module.MyEnvironment"


def episodes_are_judged_where_there_are_any(environment: Part | None, reward: Part) -> Issues:
    yield from _judges("reward", environment, reward)


def verifier_judges_episodes_where_there_are_any(environment: Part | None, verifier: Part) -> Issues:
    yield from _judges("verifier", environment, verifier)


def _judges(key: str, environment: Part | None, judge: Part) -> Issues:
    if not judge.cls.traits(judge.config).environment:
        return
    if environment is None:
        yield ConfigIssue(key, f"{judge.cls.__name__} reads what an environment gives, but there is none; add {NAMES}")
    elif not environment.cls.gives_rewards(environment.config):
        yield ConfigIssue(
            key,
            f"{judge.cls.__name__} reads what the environment gives, but {environment.cls.__name__} as configured "
            f"gives nothing: every episode would score 0; choose another {key} ({key}=math, ...)",
        )


def turns_come_from_an_environment(algorithm: Algorithm, environment: Part | None) -> Issues:
    if environment is None and algorithm.needs().turns:
        name = type(algorithm).__name__
        yield ConfigIssue("algorithm", f"{name} as configured needs turns, and there are none; add {NAMES}")


def environment_is_usable(environment: Part | None) -> Issues:
    if environment is None:
        return
    try:
        tools_of(environment.cls)
    except Exception as error:  # a user's annotation may raise anything
        yield ConfigIssue("environment", f"{environment.cls.__name__}: {error}")
        return
    for message in environment.cls.check(environment.config):
        yield ConfigIssue("environment", message)
    if not environment.cls.deterministic(environment.config):
        yield ConfigIssue(
            "environment",
            f"{environment.cls.__name__} may answer the same actions differently, so a resumed run differs from one "
            "that was not interrupted",
            warning=True,
        )


def environment_finds_its_columns(environment: Part | None, data: DataSource) -> Issues:
    if environment is None:
        return
    needs, provided = environment.cls.needs(environment.config), data.provides()
    required = [("references", needs.references), ("answer", needs.answer), *((name, True) for name in needs.columns)]
    lacking = [name for name, needed in required if needed and name not in provided]
    if lacking:
        has = ", ".join(sorted(provided)) or "nothing besides prompts"
        yield ConfigIssue(
            "environment",
            f"{environment.cls.__name__} needs {', '.join(lacking)} with every prompt, but {type(data).__name__} "
            f"provides {has}; choose other data",
        )


def policy_plays_the_episodes(environment: Part | None, rollout: RolloutConfig) -> Issues:
    if environment is None:
        return
    if rollout.source != "policy":
        yield ConfigIssue(
            "rollout.source",
            f"{rollout.source} gives whole responses, but an environment talks to the policy turn by turn; leave out "
            "the environment (environment=none), or rollout.source",
        )
    if rollout.steps != "none":
        yield ConfigIssue("rollout.steps", "has no effect with an environment: the turns of an episode are its steps")
    if rollout.structured is not None:
        yield ConfigIssue(
            f"rollout.structured.{rollout.structured.kind}",
            "applies to a whole response, but with an environment the policy writes several turns; leave it out",
        )


def budgets_fit(environment: Part | None, rollout: RolloutConfig) -> Issues:
    if environment is None or environment.config.max_turn_tokens is None:
        return
    turns, tokens, most = environment.config.max_turns, environment.config.max_turn_tokens, rollout.max_response_tokens
    if tokens > most:
        yield ConfigIssue(
            "environment.max_turn_tokens",
            f"is above rollout.max_response_tokens={most}, the limit of a whole episode; lower this, or raise that",
        )
    elif turns * tokens > most:
        yield ConfigIssue(
            "environment.max_turns",
            f"{turns} turns of up to {tokens} tokens (environment.max_turn_tokens) are {turns * tokens}, but "
            f"rollout.max_response_tokens={most} limits all of them together with what the environment says",
            warning=True,
        )


OF_PROCESSES = ("workers", "concurrency")


def options_of_processes_act(environment: Part | None, typed: AbstractSet[str]) -> Issues:
    if environment is None or environment.config.placement == "worker":
        return
    for name in OF_PROCESSES:
        if f"environment.{name}" in typed:
            yield ConfigIssue(
                f"environment.{name}", "has no effect with environment.placement=inline: no process is started"
            )


def options_of_turns_act(environment: Part | None, typed: AbstractSet[str]) -> Issues:
    if environment is not None and issubclass(environment.cls, Agent) and "environment.max_parallel_calls" in typed:
        yield ConfigIssue("environment.max_parallel_calls", "has no effect: an agent runs the tools itself")


def episodes_of_several_rows(environment: Part | None, reward: Part, algorithm: Algorithm) -> Issues:
    """An agent may hold several conversations, and a template that rewrites earlier turns splits one into several."""
    if environment is None or not may_have_segments(environment.cls, environment.config):
        return
    whose = "of an agent" if issubclass(environment.cls, Agent) else "with environment.history=rerender"
    why = f"as one row, but an episode ({whose}) may be several rows"
    if reward.cls.traits(reward.config).joins_tokens:
        yield ConfigIssue("reward", f"runs a model over prompt and response {why}; choose another reward")
    if any(one.other_prompts for one in algorithm.needs().passes.values()):
        name = type(algorithm).__name__
        yield ConfigIssue(
            "algorithm", f"{name} as configured puts responses after other prompts {why}; choose another algorithm"
        )


def longest_sample(run: ResolvedRun) -> int:
    """Return the most tokens that may follow a prompt in the learner."""
    cls, options = run.environment_class, run.environment_config
    if cls is not None and options is not None and may_have_segments(cls, options):
        return max(longest_episode(run.config), run.config.rollout.max_response_tokens)
    return run.config.rollout.max_response_tokens


ENVIRONMENTS = (
    episodes_are_judged_where_there_are_any,
    verifier_judges_episodes_where_there_are_any,
    turns_come_from_an_environment,
    environment_is_usable,
    environment_finds_its_columns,
    policy_plays_the_episodes,
    budgets_fit,
    options_of_processes_act,
    options_of_turns_act,
    episodes_of_several_rows,
)
