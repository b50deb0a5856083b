"""The plan of a run as text: parts, actors, batches, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from algorithms.base import POLICY, REFERENCE
from rlkit.config.environments import longest_sample
from rlkit.config.heldout import held_out_from
from rlkit.config.machine import host_bytes, this_machine
from rlkit.config.memory import GIB, gpu_phases, processes, size_text, total
from rlkit.config.parts import ResolvedRun
from rlkit.config.plan import (
    asks_reward,
    colocated_slots,
    element_bytes,
    engines_sleep,
    gpu_shares,
    offloads,
    published_adapter,
    references_are_cached,
    shares_gpus,
    weight_route,
)
from rlkit.config.schema import LearnerConfig, RolloutConfig, RunConfig, TrainerConfig
from rlkit.config.store import policy_shape
from rlkit.data.base import DataError, DataSource, Problem, Split
from rlkit.data.files import CHECKED_ROWS
from rlkit.data.lengths import uncountable
from rlkit.environments.base import EnvironmentConfig
from rlkit.models.folder import ModelShape, check_model_folder, model_folder
from rlkit.models.usable import known_run

WEIGHT_ROUTES = {
    "object_store": "through Ray's object store, one copy per node",
    "gloo": "by gloo",
    "nccl": "by NCCL",
    "ipc": "by CUDA IPC",
}
"""`cluster.weight_transfer` in words."""


@dataclass(frozen=True)
class Line:
    area: str
    what: str
    amount: str


def plan(run: ResolvedRun) -> list[Line]:
    shape = check_model_folder(run.config.model.path)
    lines = [*_parts(run, shape), *_actors(run), *_handover(run), *_batches(run), *_memory(run, shape)]
    return [*lines, *(Line("later", "checked at the start", what) for what in _checked_at_the_start(run))]


def plan_text(lines: Sequence[Line]) -> str:
    areas = ["", *(line.area for line in lines)]
    return "\n".join(
        f"{line.area if line.area != before else '':<9}{line.what:<31}{line.amount}"
        for before, line in zip(areas, lines, strict=False)
    )


def _adapter(run: ResolvedRun) -> str:
    trained = policy_shape(run.config).adapter
    return "" if trained is None else f"; an adapter of {trained:,} is trained"


def _parts(run: ResolvedRun, shape: ModelShape) -> list[Line]:
    size = (
        "number of parameters unknown (no safetensors)"
        if shape.parameters is None
        else f"{shape.parameters:,} parameters{_adapter(run)}"
    )
    rollout = run.config.rollout
    asked, judges = asks_reward(rollout, run.make_algorithm()), rollout.workers and rollout.source != "model"
    reward = [Line("parts", "reward", run.config.reward["_target_"]), *_reward_parts(run.config.reward)]
    return [
        Line("parts", "algorithm", run.config.algorithm["_target_"]),
        *(reward if asked else ()),
        *([Line("parts", "verifier", run.config.verifier["_target_"])] if judges else ()),
        Line("parts", "data", run.config.data["_target_"]),
        *_environment(run),
        Line("parts", "model", f"{run.config.model.path} ({size})"),
        Line("parts", "run folder", str(run.config.run_dir)),
    ]


def _environment(run: ResolvedRun) -> list[Line]:
    options = run.environment_config
    return [] if options is None else [Line("parts", "environment", run.config.environment["_target_"])]


def _reward_parts(section: Mapping[str, Any]) -> list[Line]:
    parts = section.get("parts")
    if not isinstance(parts, Mapping):
        return []
    return [
        Line("parts", f"reward {name}", f"{part['_target_']}, weight {part['weight']:g}")
        for name, part in parts.items()
        if isinstance(part, Mapping) and {"_target_", "weight"} <= set(part)
    ]


def _sharing(section: LearnerConfig) -> str:
    together = section.sequence_parallel
    return f" ({together} share each sequence)" if together > 1 else ""


def _actors(run: ResolvedRun) -> list[Line]:
    config = run.config
    cuda = config.cluster.device == "cuda"
    threads = f"{config.cluster.threads_per_actor} CPU threads each"
    shares = gpu_shares(config)
    engines = f"{_count(config.rollout.workers, 'vLLM engine')}, {threads}"
    ranks = f"{_count(config.learner.ranks, 'DeepSpeed rank')}{_sharing(config.learner)}, {threads}"
    if cuda:
        width = config.rollout.tensor_parallel_size
        split = shares_gpus(config.cluster) and width > 1
        engines += f", {shares.engine:g} of each of its {width} GPUs" if split else f", {shares.engine:g} GPU each"
        ranks += f", {shares.learner:g} GPU each"
    algorithm = run.make_algorithm()
    needs, rewards = algorithm.needs(), run.reward_config.workers
    asked = f"{_count(rewards, 'worker')} of {run.reward_class.__name__}"
    if not asks_reward(config.rollout, algorithm):
        asked = "none: " + ("the data have labels" if needs.rewards else "the algorithm reads no scores")
    lines = [
        Line("actors", "rollout", engines if config.rollout.workers else "none: the data have the responses"),
        Line("actors", "learner", ranks),
        Line("actors", "reward", asked),
    ]
    if run.environment_config is not None:
        lines.insert(1, Line("actors", "environments", _places(run.environment_config)))
    if needs.critic:
        critics, gpus = config.critic.ranks, f", {shares.critic:g} GPU each" if cuda else ""
        sharing = _sharing(config.critic)
        lines.append(Line("actors", "critic", f"{_count(critics, 'DeepSpeed rank')}{sharing}, {threads}" + gpus))
    if needs.reference_policy:
        every, mix = algorithm.config.reference_every_steps, algorithm.config.reference_mix
        moves = f"; every {_count(every, 'step')}, {mix:g} of the policy is mixed in" if every else ""
        if config.model.lora is not None:
            moves = ": the policy with its adapter off, no extra model"
        if references_are_cached(config.rollout, algorithm):
            moves = ", computed once, then read from a file; no extra model"
        lines.append(Line("actors", "reference policy", f"the initial policy, for its log-probs{moves}"))
    for one in sorted({one.model for one in needs.passes.values()} - {POLICY, REFERENCE}):
        lines.append(Line("actors", "frozen model", one))
    if shares_gpus(config.cluster):
        lines.append(Line("actors", "GPUs", _shared(config, config.critic.ranks if needs.critic else 0)))
    return lines


def _places(options: EnvironmentConfig) -> str:
    if options.placement == "inline":
        return "in the rollout workers"
    processes = "1 process" if options.workers == 1 else f"{options.workers} processes"
    return f"{processes} next to each rollout worker, up to {options.concurrency} episodes each"


def _shared(config: RunConfig, critic_ranks: int) -> str:
    places, width = colocated_slots(config, critic_ranks), config.rollout.tensor_parallel_size
    if not config.rollout.workers:
        return str(places)
    if width == 1:
        return f"{places}; an engine and the ranks with its number share one"
    engines = [f"engine {i} with ranks {i * width} to {(i + 1) * width - 1}" for i in range(config.rollout.workers)]
    shown = engines if len(engines) <= 3 else [*engines[:2], "...", engines[-1]]
    return f"{places}; {', '.join(shown)}"


def _handover(run: ResolvedRun) -> list[Line]:
    config = run.config
    route = weight_route(config.cluster, config.rollout, config.learner, config.model)
    text = WEIGHT_ROUTES[route]
    if config.model.lora is not None:
        alone = published_adapter(config.cluster, config.rollout, config.model) is not None
        text = f"{'only the adapter' if alone else 'with the adapter merged into them'}, {text}"
    if route != "object_store":
        text += f", in buckets of {config.cluster.weight_bucket_mib} MiB"
    if not config.rollout.workers or config.rollout.source == "model":
        return []
    lines = [Line("handover", "weights to the engines", text)]
    if config.cluster.device == "cuda":
        who = {"learner": offloads(config, config.learner)}
        if run.make_algorithm().needs().critic:
            who["critic"] = offloads(config, config.critic)
        waiting = " and ".join(name for name, does in who.items() if does) or "nothing"
        asleep = "sleep" if engines_sleep(config) else "keep their memory"
        lines.append(Line("handover", "while the learner works", f"the engines {asleep}"))
        lines.append(Line("handover", "while the engines sample", f"in host memory: {waiting}"))
    return lines


def _batches(run: ResolvedRun) -> list[Line]:
    trainer, learner, rollout = run.config.trainer, run.config.learner, run.config.rollout
    if rollout.source == "data":
        return _recorded_batches(run)
    samples = run.algorithm_config.samples_per_prompt
    responses = trainer.prompts_per_step * samples
    per_update = trainer.prompts_per_step // learner.minibatches_per_step
    most_tokens = trainer.prompts_per_step * (rollout.max_prompt_tokens + samples * rollout.max_response_tokens)
    return [
        *_few_problems(run),
        Line("batches", "each step", f"{trainer.prompts_per_step} prompts x {samples} samples = {responses} responses"),
        *_episodes(run),
        Line("batches", "each optimizer step", f"{per_update} prompts = {per_update * samples} responses"),
        Line("batches", "whole run", _whole_run(trainer, learner.optimizer_steps, responses)),
        Line(
            "batches",
            "tokens per step",
            f"at most {most_tokens:,}, in micro-batches of up to {learner.tokens_per_microbatch:,}",
        ),
        *_learning_rates(run),
        *_held_out(run),
        Line("batches", "each evaluation", _evaluation(run)),
        *_staleness(run),
    ]


def _few_problems(run: ResolvedRun) -> Iterator[Line]:
    """Yield the number of training problems in files; generated problems never run out."""
    if getattr(run.data_config, "path", None) and (known := len(_problems(run, "train"))):
        fewer = known < run.config.trainer.prompts_per_step
        again = ", fewer than a step takes: each step asks them several times" if fewer else ""
        yield Line("batches", "training data", f"{_count(known, 'problem')}{again}")


def _episodes(run: ResolvedRun) -> list[Line]:
    options, most = run.environment_config, run.config.rollout.max_response_tokens
    if options is None:
        return []
    of_turn = "" if options.max_turn_tokens is None else f" of up to {options.max_turn_tokens} tokens"
    turns = f"at most {_count(options.max_turns, 'turn')}{of_turn}"
    rows = longest_sample(run)
    several = f"; all rows of an episode together have up to {rows:,}" if rows > most else ""
    said = f"{most} tokens including what the environment says"
    return [Line("batches", "each response", f"{turns}; {said}{several}")]


def _whole_run(trainer: TrainerConfig, updates: int, responses: int) -> str:
    steps = trainer.total_steps
    if trainer.total_epochs is not None:  # the number of steps depends on the data
        return f"{_count(trainer.total_epochs, 'epoch')}, {_count(updates, 'optimizer step')} per step"
    return f"{steps} steps x {updates} = {steps * updates} optimizer steps, {steps * responses:,} responses"


def _learning_rates(run: ResolvedRun) -> Iterator[Line]:
    for name in ("learner", "critic") if run.make_algorithm().needs().critic else ("learner",):
        section: LearnerConfig = getattr(run.config, name)
        origin = run.origins[f"{name}.learning_rate"]
        yield Line("batches", f"learning rate, {name}", f"{section.learning_rate:g} ({origin}), {section.schedule}")


def _recorded_batches(run: ResolvedRun) -> list[Line]:
    trainer, updates, problems = run.config.trainer, run.config.learner.optimizer_steps, _problems(run, "train")
    steps, lines = trainer.steps_on(len(problems)), list[Line]()
    whole = [f"{_count(steps, 'step')} x {updates} = {_count(steps * updates, 'optimizer step')}"]
    if not problems and trainer.total_epochs is not None:
        whole = [_count(updates, "optimizer step") + " per step"]
    if problems:
        parts = {"prompt": len(problems), "response": sum(len(p.responses) or len(p.references) for p in problems)}
        parts |= {"pair": sum(len(problem.pairs) for problem in problems)}
        counted = [_count(number, noun) for noun, number in parts.items() if number]
        lines.append(Line("batches", "training data", f"{', '.join(counted)}; those that are too long are left out"))
    passes = trainer.total_epochs or (steps * trainer.prompts_per_step / len(problems) if problems else 0)
    if passes:
        whole.append(f"{passes:.3g} {'pass' if passes == 1 else 'passes'} over the data")
    heldout = f"the held-out ones, at most {_count(trainer.evaluation_prompts, 'prompt')}"
    if run.config.evaluation.generate:
        heldout = _evaluation(run)
    return [
        *lines,
        Line("batches", "each step", f"{_count(trainer.prompts_per_step, 'prompt')} with the data's responses"),
        Line("batches", "whole run", ", ".join(whole)),
        *_learning_rates(run),
        *_held_out(run),
        Line("batches", "each evaluation", heldout),
    ]


def _held_out(run: ResolvedRun) -> Iterator[Line]:
    count = getattr(run.data_config, "heldout_problems", None) or len(_problems(run, "heldout"))
    told = f"{_count(count, 'problem')}, " if count else ""
    yield Line("batches", "held out", f"{told}{held_out_from(run.data_config)}")
    for name, one in run.sets.items():
        source = run.make_set(name)
        rows = problems_if_few(source, source.load_set)
        where = getattr(one.config, "path", None) or one.source.__name__
        told = f"{_count(len(rows), 'problem')} of " if rows else ""
        yield Line("batches", f"held out, {name}", f"{told}{where} (evaluation.sets.{name})")


def _problems(run: ResolvedRun, split: Split) -> Sequence[Problem]:
    return problems_if_few(run.source, lambda: run.source.load(split))


def problems_if_few(source: DataSource, load: Callable[[], tuple[Sequence[Problem], object]]) -> Sequence[Problem]:
    """Return the problems that `load` reads; none if they are too many to read for a plan, or unreadable."""
    with suppress(DataError):
        if not source.check() and 0 < sum(p.rows for p in source.preview("train")) < 0.9 * CHECKED_ROWS:
            return load()[0]
    return []


def _evaluation(run: ResolvedRun) -> str:
    config, most = run.config.evaluation, run.config.trainer.evaluation_prompts
    temperature = run.config.rollout.temperature if config.temperature is None else config.temperature
    how = "greedy" if config.greedy else f"at temperature {temperature:g}"
    sets = [f"{name} ({one.prompts or most})" for name, one in run.sets.items()]
    further = f"; further sets: {', '.join(sets)}" if sets else ""
    return f"at most {most} prompts x {_count(config.samples, 'response')}, {how}{further}"


def _staleness(run: ResolvedRun) -> list[Line]:
    most = run.config.trainer.max_staleness
    if not most:
        return []
    how = getattr(run.algorithm_config, "rollout_correction", None)
    bound = getattr(run.algorithm_config, "largest_weight", None)
    corrects = getattr(run.algorithm_config, "corrects", False)
    weights = {
        "truncate": f"importance weights truncated at {bound}",
        "mask": f"importance weights, tokens above {bound} left out",
        "decoupled": "importance weights, not truncated",
        "sequence_truncate": f"importance weights of whole samples, truncated at {bound}",
        "sequence_mask": f"importance weights of whole samples, those above {bound} left out",
        "geometric_mask": f"no importance weights, samples above {bound} per token left out",
    }.get(how or "", "the loss's ratio is to the sampler" if corrects else "no importance weights")
    return [Line("batches", "staleness", f"at most {_count(most, 'version')}; {weights}")]


def _memory(run: ResolvedRun, shape: ModelShape) -> list[Line]:
    if shape.parameters is None:
        return [Line("memory", "unknown", "as the number of parameters is: the weights are not safetensors")]
    machine = this_machine(run)
    cuda = run.config.cluster.device == "cuda"
    rollout = run.config.rollout
    lines = [Line("memory", "key-value cache, each engine", _cache(rollout, shape, cuda))] if rollout.workers else []
    there = processes(run, machine.gpu_bytes)
    for process in there:
        busy = process.phases.get("update") or process.phases.get("score")
        if busy is not None and "engine" not in process.name:
            parts = busy.device if busy.device else busy.host
            lines.append(Line("memory", f"{process.name}, at work", _parts_text(parts)))
    for name, parts in gpu_phases(run, machine.gpu_bytes).items() if cuda else ():
        size = "" if machine.gpu_bytes is None else f" of {size_text(machine.gpu_bytes)}"
        lines.append(Line("memory", f"GPU, {name}", f"{size_text(total(parts))}{size}"))
    for process in there:
        times = f"{process.count} x " if process.count > 1 else ""
        lines.append(Line("memory", f"host, {process.name}", f"{times}{size_text(process.host())}"))
    limit = f" of {size_text(machine.host_bytes)}" if machine.host_bytes else ""
    where = "a machine of 8 GPUs" if cuda else "a machine" if run.elsewhere else "this machine"
    return [*lines, Line("memory", f"host, {where}", f"{size_text(host_bytes(run, machine))}{limit}")]


def _checked_at_the_start(run: ResolvedRun) -> Iterator[str]:
    """Yield the checks that take too long for a plan; the run does them before any actor starts."""
    folder = model_folder(run.config.model.path)
    if known_run(folder) is None:
        yield "the model's architecture, which docs/models.md does not list"
    if why := uncountable(folder):
        yield f"lengths of prompts ({why})"
    elif run.data_class.preview is DataSource.preview:
        yield "lengths of prompts (the data source has no preview)"
    if run.environment_class is not None:
        yield "whether the chat template can continue after a turn"


def _parts_text(parts: Mapping[str, float]) -> str:
    shown = sorted(((size, name) for name, size in parts.items() if size >= 2**10), reverse=True)
    return f"{size_text(total(parts))}: " + ", ".join(f"{name} {size_text(size)}" for size, name in shown)


def _cache(rollout: RolloutConfig, shape: ModelShape, cuda: bool) -> str:
    """Describe the cache and its upper bound: all concurrent samples at full length (shared prompts count once)."""
    length = rollout.max_prompt_tokens + rollout.max_response_tokens
    sample = length * shape.kv_bytes_per_token(element_bytes(rollout.dtype, cuda))
    full = f"{size_text(sample)} for each of up to {rollout.max_concurrent_samples} samples at full length"
    cache = f"{rollout.gpu_memory_utilization:.0%} of the GPU" if cuda else size_text(rollout.memory_gib * GIB)
    return f"{cache} given to the engine; {full}"


def _count(number: float, noun: str) -> str:
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"
