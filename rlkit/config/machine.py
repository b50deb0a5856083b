"""What this machine has and whether a run fits; refusals name the keys that would help, and by how much."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlkit.config.activations import Parts
from rlkit.config.compose import spelled
from rlkit.config.lora import LoraConfig
from rlkit.config.memory import (
    ENGINE_WORKS,
    GIB,
    gpu_phases,
    processes,
    size_text,
    total,
)
from rlkit.config.messages import ConfigError, ConfigIssue, Issues
from rlkit.config.parts import ResolvedRun, conf_dir
from rlkit.config.plan import (
    colocated_slots,
    element_bytes,
    has_engines,
    longest_response,
    sampled_path,
    shares_gpus,
)
from rlkit.config.schema import ClusterConfig, RunConfig, TrainerConfig
from rlkit.config.tracking import TENSORBOARD
from rlkit.experience.extras import refuse_without
from rlkit.models.folder import check_model_folder, model_folder
from rlkit.models.usable import known_run

GPUS_PER_MACHINE = 8
NVIDIA_SECONDS = 20.0
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
PRECISION = 0.15
"""Relative error of the predicted host memory; a run that may just fit is not refused."""


@dataclass(frozen=True)
class Machine:
    """The machine on which a run would start. None means unknown: another machine, or one without a GPU."""

    host_bytes: float | None
    gpu_bytes: float | None
    cores: int | None


def this_machine(run: ResolvedRun) -> Machine:
    """Return the machine. Configured sizes take precedence over this machine's; a joined cluster may be anywhere."""
    cluster, here = run.config.cluster, _stays_here(run)
    gpus = gpus_here() if here and cluster.device == "cuda" and cluster.gpu_memory_gib is None else []
    named = None if cluster.gpu_memory_gib is None else cluster.gpu_memory_gib * GIB
    host = None if cluster.host_memory_gib is None else cluster.host_memory_gib * GIB
    if host is None and here and (cluster.device == "cpu" or gpus):
        host = host_memory()
    return Machine(host, named or min(gpus, default=None), os.cpu_count() if here else None)


def _stays_here(run: ResolvedRun) -> bool:
    return not run.elsewhere and starts_ray(run.config.cluster)


def starts_ray(cluster: ClusterConfig) -> bool:
    return cluster.address is None and not os.environ.get("RAY_ADDRESS")


def host_memory() -> float:
    """Return the bytes of memory of this machine, or of this process's control group."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    size = float(line.split()[1]) * 1024
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():
            size = min(size, float(text))
    return size


def gpus_here() -> list[float]:
    """Return the bytes of each GPU of this machine that nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = [command, "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=NVIDIA_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in answer.splitlines()]
    cards = {name.strip(): float(size) * 2**20 for name, _, size in rows if size.strip().isdigit()}
    return _visible(cards, os.environ.get(VISIBLE_GPUS))


def _visible(cards: Mapping[str, float], names: str | None) -> list[float]:
    """Return the sizes of the visible GPUs. A part of a GPU (MIG), whose size is not listed here, counts as the
    smallest card."""
    sizes = list(cards.values())
    if names is None or not sizes:
        return sizes
    visible = []
    for name in (part.strip() for part in names.split(",")):
        if name.isdigit() and int(name) < len(sizes):
            visible.append(sizes[int(name)])
        elif name.startswith(("GPU-", "MIG-")):
            visible.append(next((size for uuid, size in cards.items() if uuid.startswith(name)), min(sizes)))
        else:
            break  # as CUDA does
    return visible


def refuse_missing_packages(config: RunConfig) -> None:
    """Raise NotInstalledError for packages missing here, and, if this process starts Ray, for those of its actors."""
    sampled = has_engines(config.rollout, config.evaluation)
    actors = ("deepspeed", *(["vllm"] if sampled else [])) if starts_ray(config.cluster) else ()
    trackers = [TENSORBOARD] if any(tracker.kind == TENSORBOARD for tracker in config.tracking.trackers) else ()
    refuse_without("torch", "transformers", "ray", *actors, *trackers)


def refuse_missing_gpus(config: RunConfig) -> None:
    """Raise ConfigError if a run that starts its own Ray needs more GPUs than there are; Ray would wait a minute."""
    if config.cluster.device == "cuda" and starts_ray(config.cluster):
        remedy = (
            "cluster=local_cpu runs on its CPU, cluster.address joins a Ray cluster that has them, "
            "dry_run=true only plans"
        )
        refuse_fewer_gpus(_gpus(config), "cluster.device=cuda", remedy)


def refuse_fewer_gpus(needed: int, where: str, remedy: str) -> None:
    """Raise ConfigError, at `where`, if this process may use fewer GPUs than `needed`."""
    there, named = len(gpus_here()), os.environ.get(VISIBLE_GPUS)
    if there < needed:
        of_them = "" if named is None else f" for this process ({VISIBLE_GPUS}={named})"
        wants = f"needs {needed} {'GPU' if needed == 1 else 'GPUs'}, but this machine has {there or 'none'}{of_them}"
        raise ConfigError([ConfigIssue(where, f"{wants}; {remedy}")])


def _gpus(config: RunConfig) -> int:
    """Return a lower bound of the GPUs; critic and rewards are left out where each has GPUs of its own."""
    engines = config.rollout.workers * config.rollout.tensor_parallel_size
    return colocated_slots(config, 0) if shares_gpus(config.cluster) else engines + config.learner.ranks


def host_bytes(run: ResolvedRun, machine: Machine) -> float:
    """Return the peak of all processes on the driver's machine; with GPUs, machines of eight GPUs are assumed."""
    cuda = run.config.cluster.device == "cuda"
    machines = max(1, -(-_gpus(run.config) // GPUS_PER_MACHINE)) if cuda else 1
    return sum(-(-process.count // machines) * process.host() for process in processes(run, machine.gpu_bytes))


def fits(run: ResolvedRun) -> Issues:
    """Check for what cannot fit, and for what exceeds this machine, as far as its size is known."""
    machine = this_machine(run)
    yield from _tensor_parallel(run)
    yield from _cores(run, machine)
    if check_model_folder(run.config.model.path).parameters is None:
        return
    yield from _host(run, machine)
    if run.config.cluster.device == "cuda" and machine.gpu_bytes is not None:
        if run.config.rollout.workers:
            yield from _engine(run, machine.gpu_bytes)
        yield from _gpu(run, machine.gpu_bytes)


def _tensor_parallel(run: ResolvedRun) -> Issues:
    config, shape = run.config, check_model_folder(sampled_path(run.config))
    width, gpus = config.rollout.tensor_parallel_size, _gpus(config)
    if config.rollout.workers and not shape.shares_heads(width):
        fit = [str(n) for n in range(2, GPUS_PER_MACHINE + 1) if shape.shares_heads(n)] or ["only 1"]
        yield ConfigIssue(
            "rollout.tensor_parallel_size",
            f"{width} GPUs cannot share the model's {shape.heads} attention heads and {shape.kv_heads} key-value heads "
            f"equally; {', '.join(fit)} can",
        )
    if config.cluster.device == "cuda" and _stays_here(run) and gpus > GPUS_PER_MACHINE:
        yield ConfigIssue(
            "cluster.address",
            f"is not set, so the run stays on this machine, but it needs {gpus} GPUs (rollout.workers="
            f"{config.rollout.workers} x rollout.tensor_parallel_size={width}, learner.ranks={config.learner.ranks}), "
            f"more than the {GPUS_PER_MACHINE} of most machines",
            warning=True,
        )


def _cores(run: ResolvedRun, machine: Machine) -> Issues:
    threads, rollout = run.config.cluster.threads_per_actor, run.config.rollout
    if machine.cores is None or run.config.cluster.device == "cuda":
        return
    if threads > max(machine.cores, ClusterConfig().threads_per_actor):
        yield ConfigIssue(
            "cluster.threads_per_actor",
            f"this machine has {machine.cores} cores; more threads than cores only wait for each other",
            warning=True,
        )
    if rollout.workers > max(machine.cores, 2):
        yield ConfigIssue(
            "rollout.workers",
            f"{rollout.workers} engines share the {machine.cores} cores of this machine, but one alone can use them "
            "all",
            warning=True,
        )


def _host(run: ResolvedRun, machine: Machine) -> Issues:
    there, needed = machine.host_bytes, host_bytes(run, machine)
    store = run.config.cluster.object_store_gib
    if there is not None and store is not None and store * GIB > there:
        yield ConfigIssue("cluster.object_store_gib", f"the machine has {size_text(there)} of memory")
    if there is None or needed * (1 - PRECISION) <= there:
        return
    largest = max(processes(run, machine.gpu_bytes), key=lambda process: process.count * process.host())
    phase = max(largest.phases.values(), key=lambda phase: total(phase.host))
    times = f"{largest.count} x " if largest.count > 1 else ""
    changes = _helpful(run, lambda changed: host_bytes(changed, machine))
    yield ConfigIssue(
        _host_key(run),
        f"the processes on one machine need {size_text(needed)} of memory at their peak, but it has "
        f"{size_text(there)}; the largest part is for {largest.name}: {times}{size_text(largest.host())} "
        f"({_parts(phase.host)}). {changes}",
    )


def _host_key(run: ResolvedRun) -> str:
    """Return the key to blame: the cache's if it is larger than the learner's state, as it alone can be of any size."""
    rollout, parameters = run.config.rollout, check_model_folder(run.config.model.path).parameters or 0
    cpu = run.config.cluster.device == "cpu"
    return "rollout.memory_gib" if cpu and rollout.memory_gib * GIB > 20 * parameters + 2 * GIB else "model.path"


def _engine(run: ResolvedRun, gpu: float) -> Issues:
    rollout, shape = run.config.rollout, check_model_folder(sampled_path(run.config))
    width = element_bytes(rollout.dtype, True)
    weights = width * (shape.parameters or 0) / rollout.tensor_parallel_size
    length = rollout.max_prompt_tokens + longest_response(rollout, run.config.evaluation)
    split = min(rollout.tensor_parallel_size, shape.kv_heads)
    sequence = length * shape.kv_bytes_per_token(width) / split
    share, needed = rollout.gpu_memory_utilization * gpu, weights + sequence + ENGINE_WORKS * GIB
    if needed <= share:
        return
    enough = needed / gpu
    more = f"rollout.gpu_memory_utilization={min(0.95, enough + 0.1):.2f}, or " if enough < 0.9 else ""
    fixed = needed - weights - sequence
    spread = (weights + sequence) * rollout.tensor_parallel_size
    wider = [n for n in (2, 4, 8) if n > rollout.tensor_parallel_size and shape.shares_heads(n)]
    wide = next((n for n in wider if fixed + spread / n <= share), None)
    split_more = f"rollout.tensor_parallel_size={wide}" if wide else "larger GPUs, or a smaller model"
    yield ConfigIssue(
        "rollout.gpu_memory_utilization",
        f"gives an engine {size_text(share)} of each GPU; weights ({size_text(weights)}), a sequence of {length} "
        f"tokens ({size_text(sequence)}) and working memory ({ENGINE_WORKS:g} GiB) need {size_text(needed)}. Try "
        f"{more}{split_more}",
    )


def _gpu(run: ResolvedRun, gpu: float) -> Issues:
    phases = gpu_phases(run, gpu)
    name, parts = max(phases.items(), key=lambda item: total(item[1]))
    if total(parts) <= gpu:
        return
    changes = _helpful(run, lambda changed: max(map(total, gpu_phases(changed, gpu).values())), gpu)
    yield ConfigIssue(
        "model.path",
        f"a GPU of {size_text(gpu)} would have to hold {size_text(total(parts))} ({name}: {_parts(parts)}). {changes}",
    )


def _parts(parts: Parts) -> str:
    largest = sorted(((size, name) for name, size in parts.items()), reverse=True)[:5]
    return ", ".join(f"{name} {size_text(size)}" for size, name in largest if size >= 2**20)


def _helpful(run: ResolvedRun, peak: Any, limit: float | None = None) -> str:
    """Describe the four changes that save the most memory, with how much they save."""
    now = peak(run)
    saved = sorted(((now - peak(changed), text) for text, changed in _changes(run)), reverse=True)
    best = [(size, text) for size, text in saved if size >= 2**26][:4]
    if not best:
        return "No change of a key would save much: use a smaller model, or a larger machine"
    enough = "" if limit is None or any(now - size <= limit for size, _ in best) else "; no single one is enough"
    return "What would help: " + ", ".join(f"{text} (-{size_text(size)})" for size, text in best) + enough


def _changes(run: ResolvedRun) -> Iterator[tuple[str, ResolvedRun]]:
    """Yield variants of the run with one change each."""
    config, cuda = run.config, run.config.cluster.device == "cuda"
    learner, rollout, cluster = config.learner, config.rollout, config.cluster

    def changed(section: str, **values: Any) -> tuple[str, ResolvedRun]:
        new = getattr(config, section).model_copy(update=values)
        shown = " ".join(f"{section}.{key}={spelled(value)}" for key, value in values.items())
        return shown, replace(run, config=config.model_copy(update={section: new}))

    if config.model.lora is None:
        adapted = config.model.model_copy(update={"lora": LoraConfig(rank=16)})
        yield "model.lora.rank=16", replace(run, config=config.model_copy(update={"model": adapted}))
    if not learner.gradient_checkpointing:
        yield changed("learner", gradient_checkpointing=True)
    least = rollout.max_prompt_tokens + rollout.max_response_tokens
    if learner.tokens_per_microbatch // 2 >= least:
        yield changed("learner", tokens_per_microbatch=max(least, learner.tokens_per_microbatch // 4))
    if learner.logit_elements_per_chunk > 2**22:
        yield changed("learner", logit_elements_per_chunk=2**22)
    if learner.ranks > 1 and learner.zero_stage < 3:
        yield changed("learner", zero_stage=3)
    shape, rows = check_model_folder(config.model.path), known_run(model_folder(config.model.path)) == "rows"
    for together in (2, 4, 8):
        wider = together > learner.sequence_parallel and not learner.ranks % together
        if cuda and wider and shape.shares_heads(together) and not rows:
            yield changed("learner", sequence_parallel=together)
    if cuda and learner.gradient_checkpointing and not learner.offload_activations:
        yield changed("learner", offload_activations=True)
    if cuda:
        for name, ranks in (("multi_gpu", 8), ("multi_node", 16)):
            if learner.ranks < ranks:
                yield f"cluster={name}", replace(run, config=_preset(config, name))
        if shares_gpus(cluster) and config.trainer.max_staleness == 0:
            if learner.offload == "never" and learner.zero_stage:
                yield changed("learner", offload="auto")
            if rollout.sleep == "never":
                yield changed("rollout", sleep="auto")
        if rollout.gpu_memory_utilization > 0.4:
            yield changed("rollout", gpu_memory_utilization=round(rollout.gpu_memory_utilization - 0.2, 2))
    else:
        if rollout.workers > 1:
            yield changed("rollout", workers=1)
        if rollout.memory_gib > 1:
            yield changed("rollout", memory_gib=1)
    if config.trainer.prompts_per_step >= 2 * TrainerConfig().prompts_per_step:
        yield changed("trainer", prompts_per_step=config.trainer.prompts_per_step // 2)
    if getattr(run.algorithm_config, "kl_coefficient", 0):
        yield (
            "algorithm.kl_coefficient=0",
            replace(run, algorithm_config=run.algorithm_config.model_copy(update={"kl_coefficient": 0.0})),
        )


def _preset(config: RunConfig, name: str) -> RunConfig:
    sections: dict[str, Any] = yaml.safe_load((conf_dir() / "cluster" / f"{name}.yaml").read_text(encoding="utf-8"))
    changes = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in sections.items()
        # The sizes of a GPU and of a machine stay, and a run that samples nothing gets no engines.
        if section != "cluster" and (section != "rollout" or config.rollout.workers)
    }
    return config.model_copy(update=changes)
