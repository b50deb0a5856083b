"""From arguments to a checked evaluation: the parts and options of a run, without those for training."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig

import rlkit
from rewards.base import Reward, RewardConfig
from rlkit.assessment.endpoint import address_problem, token_problem
from rlkit.assessment.schema import EvaluateRun
from rlkit.assessment.subject import config_of, find_subject
from rlkit.checkpoint.folder import sealed_folders
from rlkit.config.checks import run_checks
from rlkit.config.command import split_off_subject
from rlkit.config.compose import option_fields
from rlkit.config.heldout import ROWS, held_out_sets_are_usable
from rlkit.config.loading import Loading
from rlkit.config.messages import MISSING, ConfigError, ConfigIssue, Issues, of_the_set
from rlkit.config.parts import CONTRACTS, OWN, TARGET, Contract, HeldoutSet, Part, conf_dir, make_source
from rlkit.data.base import DataSource
from rlkit.models.folder import ModelFolderError, check_model_folder

Kind = Literal["engine", "endpoint", "recorded"]
"""Who answers: vLLM engines started here, a server, or nobody, because the data bring answers."""
JUDGES = Contract(Reward, RewardConfig, optional=True)
USED: tuple[str, ...] = (
    *("seed", "run_dir", "resume", "dry_run", "run", "checkpoints", "evaluate", "model", "rollout", "cluster"),
    *("tracking", "data", "reward", "verifier", "environment"),
)
TIMES = ("trainer.step_timeout_seconds", "trainer.startup_timeout_seconds")
OF_TRAINING = ("reward", "trainer", "evaluation", "buffer", "diagnostics", "tracking", "resume")
"""Sections of a run's configuration that do not apply to its evaluation."""
UNWRITTEN = {"algorithm", "critic", "buffer", "diagnostics", "evaluation"}
SETS = "evaluation.sets"
SPELLED = {"policy=none": "rollout.source=data", "model=endpoint": "model=hf"}
"""Aliases: policy=none means recorded answers, and an endpoint is a model without a folder."""
LONGEST_SECONDS = 86400.0
"""Default limit: all answers of one model are a single wait, during which the engines report progress."""
TO_ENDPOINT: tuple[str, ...] = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "max_response_tokens"),
    *("max_concurrent_samples", "sample_seeds"),
)


@dataclass(frozen=True)
class Policy:
    """A model that answers."""

    step: int
    path: str
    """A folder, or the address of a server; empty for recorded answers."""


@dataclass(frozen=True)
class Evaluating:
    """A checked evaluation."""

    config: EvaluateRun
    kind: Kind
    data: Part
    environment: Part | None
    judge: Part | None
    """Judges what an answer is worth."""
    chooser: Part | None
    """A second reward, which chooses the best of k."""
    policies: tuple[Policy, ...]
    sets: Mapping[str, HeldoutSet]
    """Further sets of questions by name: `evaluation.sets`."""
    own_questions: bool
    """Whether the questions are a run's held-out problems and no other data."""
    warnings: tuple[ConfigIssue, ...] = ()

    def source(self, name: str = OWN) -> DataSource:
        """Return the source of the questions, or of a further set."""
        environment, one = self.environment or Part(None, None), self.data_of(name)
        return make_source(one.cls, one.config, self.config.seed, environment.cls, environment.config)

    def data_of(self, name: str) -> Part:
        return Part(self.sets[name].source, self.sets[name].config) if name else self.data

    def section(self, part: Part) -> dict[str, Any]:
        """Return a reward's configuration in the form its workers take."""
        return self.config.verifier if part is self.judge and self.config.verifier[TARGET] else self.config.reward

    @property
    def texts_suffice(self) -> bool:
        """Whether recorded answers can be judged without tokens."""
        parts = [part for part in (self.judge, self.chooser) if part is not None]
        return all(part.cls.traits(part.config).judges_texts for part in parts)

    def text(self, command: str = "evaluate") -> str:
        """Return the content of the folder's `config.yaml`, which `--config FILE` reads."""
        head = f"# Written by rlkit {rlkit.__version__}. To repeat: python -m rlkit.{command} --config THIS_FILE\n"
        return head + yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    def plain(self) -> dict[str, Any]:
        sets = {"evaluation": {"sets": self.config.evaluation.sets}} if self.sets else {}
        return self.config.model_dump(mode="json", exclude=UNWRITTEN) | sets


def load_evaluation(arguments: Sequence[str], file: Path | None = None, *, judged: bool = True) -> Evaluating:
    """Resolve a run, checkpoint or model and Hydra overrides, on top of a file or of the run's configuration. Raises
    ConfigError with every problem. `judged`: whether there must be a reward; if False there is none."""
    loading = _Loading(arguments, file, judged)
    loading.validate()
    loading.check()
    return loading.result()


class _Loading(Loading):
    def __init__(self, arguments: Sequence[str], file: Path | None, judged: bool) -> None:
        named, others = split_off_subject(arguments)
        subject = None if named is None else find_subject(named)
        added = [] if subject is None else subject.overrides()
        for argument in others:
            if argument.partition("=")[0] in {one.partition("=")[0] for one in added}:
                raise ConfigError([ConfigIssue(argument, f"{named} says that already; leave one of them out")])
        self.judged, self.served = judged, "model=endpoint" in others
        self.run = None if subject is None else subject.run
        if self.run is not None:
            if file is not None:
                raise ConfigError([ConfigIssue(f"--config {file}", f"run={self.run} already has a configuration")])
            file = self.run / "config.yaml"
            if not file.is_file():
                raise ConfigError([ConfigIssue(f"run={self.run}", f"is not the folder of a run: there is no {file}")])
        groups = ("data", "verifier", "environment", "cluster", "rollout", "learner")
        chosen = {argument.partition("=")[0] for argument in others} & set(groups)
        # A run's sections for training do not apply here, and what is named replaces the run's own.
        self.unread_sections = () if self.run is None else (*OF_TRAINING, *chosen)
        contracts = {**CONTRACTS, "reward": JUDGES, "verifier": JUDGES}
        words = [SPELLED.get(argument, argument) for argument in (*added, *others)]
        super().__init__(words, file, folder=conf_dir(), schema=EvaluateRun, contracts=contracts)
        self._refuse_what_is_for_training()

    def _refuse_what_is_for_training(self) -> None:
        for key, argument in self.overrides.typed.items():
            if key.partition(".")[0] not in USED and key not in TIMES and not key.startswith(SETS):
                has = ", ".join((*USED, SETS))
                self.problems.append(ConfigIssue(argument, f"has no effect here; these keys do: {has}"))
            elif not self.judged and key.partition(".")[0] in ("reward", "verifier"):
                remedy = "python -m rlkit.evaluate judges answers"
                self.problems.append(ConfigIssue(argument, f"has no effect in rlkit.generate; {remedy}"))

    def _plain(self, composed: DictConfig) -> dict[str, Any]:
        tree = super()._plain(composed)
        typed = {key.partition(".")[0] for key in self.overrides.typed}
        known = typed | self.sources.in_file
        tree["tracking"].setdefault("tensorboard", False)
        tree["trainer"].setdefault("step_timeout_seconds", LONGEST_SECONDS)
        if self.served and tree["model"].get("path") == MISSING:
            tree["model"]["path"] = tree["model"].get("url") or ""
        if isinstance(one := tree.get("checkpoints"), int):
            tree["checkpoints"] = [one]
        self.own_questions = self._asks_its_own(tree)
        if self.run is not None:
            self._as_in_the_run(tree)
        if self._new_folder:
            tree["run_dir"] = f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{self._called(tree)}"
        if not self.judged or "reward" not in known:
            tree["reward"] = {TARGET: None}
        if not self.judged or ("verifier" not in known and "reward" in typed):
            tree["verifier"] = {TARGET: None}
        elif "verifier" not in known and (tree["environment"] or {}).get(TARGET):
            tree["verifier"] = option_fields(self.folder, "reward", "environment")
        elif "verifier" not in known and tree["rollout"].get("source") == "data":
            tree["verifier"] = {TARGET: None}  # the data's own labels
        return tree

    def _called(self, tree: dict[str, Any]) -> str:
        """Name a folder after what is evaluated and on which data."""
        path, model = tree["data"].get("path"), str(tree["model"].get("path"))
        data = Path(path).name.partition(".")[0] if isinstance(path, str) and path else self.sources.options["data"]
        if tree["rollout"].get("source") == "data":
            what = "recorded"
        elif self.served:
            what = tree["model"].get("name") or "endpoint"
        elif self.run is None:
            what = Path(model.rpartition(":")[2]).name
        else:
            steps = tree.get("checkpoints", "last")
            if steps == "last":
                steps = [int(folder.name[5:]) for folder in sealed_folders(self.run / "checkpoints")[:1]]
            what = "_".join([self.run.absolute().name, *(["all"] if steps == "all" else map(str, steps))])
            data = "heldout" if self.own_questions else data
        return re.sub(r"[^\w.+-]+", "-", f"{'evaluate' if self.judged else 'generate'}_{what}_{data}")

    def _asks_its_own(self, tree: Mapping[str, Any]) -> bool:
        """Whether the questions are a run's own. An evaluation's file does not record this; its data show it."""
        if {"data", f"data.{TARGET}", *(f"data.{key}" for key in ROWS)} & self.overrides.typed.keys():
            return False
        run = tree.get("run")
        in_file = run is not None and config_of(Path(run)).get("data", {}).get("path") == tree["data"].get("path")
        return self.run is not None or in_file

    def _as_in_the_run(self, tree: dict[str, Any]) -> None:
        """Sample held-out answers as the run did."""
        assert self.run is not None
        typed = self.overrides.typed.keys()
        tree["run"], tree["rollout"]["source"], tree["rollout"]["source_path"] = str(self.run), "policy", None
        evaluation = config_of(self.run).get("evaluation") or {}
        for name in ("temperature", "max_response_tokens"):
            value = evaluation.get(name)
            if value is not None and f"rollout.{name}" not in typed:
                tree["rollout"][name] = value
        if evaluation.get("greedy") and not {"evaluate.samples", "evaluate.greedy", "rollout.temperature"} & typed:
            tree["evaluate"] = {**tree.get("evaluate", {}), "samples": 0, "greedy": True}
        if self.own_questions:  # other questions replace all of the run's
            sets = tree["evaluation"].setdefault("sets", {})
            for name, section in (evaluation.get("sets") or {}).items():
                sets[name] = {**section, **sets.get(name, {})}

    def check(self) -> None:
        checked = {name: self.available[name] for name in self.available if name in USED}
        checked |= {"typed": frozenset(self.overrides.typed), "new_folder": self._new_folder, "here": True}
        self.kind: Kind = "engine"
        rollout, model = self.available.get("rollout"), self.available.get("model")
        if model is not None and (model.url is not None or self.served):
            self.kind = "endpoint"
        elif rollout is not None and rollout.source == "data":
            self.kind = "recorded"
        self.policies = self._policies() if model is not None else ()
        if self.kind == "engine" and model is not None and self.policies:
            checked["model"] = model.model_copy(update={"path": self.policies[0].path})
            checked["model_shape"] = _shape_or_error(self.policies[0].path)
        else:
            checked.pop("model", None)
        if self.tree.get("environment") == {TARGET: None}:
            checked["environment"] = None
        checked |= {kind: part for kind, part in self.parts.items() if kind in ("reward", "verifier", "environment")}
        evaluate, evaluation = self.available.get("evaluate"), self.available.get("evaluation")
        if evaluate is not None and evaluation is not None:
            checked["evaluation"] = evaluation.model_copy(update={"samples": max(1, evaluate.samples)})
        if "data" in self.parts and "seed" in self.available:
            if (source := self._made("data", self.parts["data"])) is not None:
                source.asks_all = not self.own_questions
                checked["data"] = source
            of_sets = {name: Part(one.source, one.config) for name, one in self.sets.items()}
            checked["sets"] = {name: self._made(f"{SETS}.{name}", part) for name, part in of_sets.items()}
        for group in self.overrides.guessed:
            checked.pop(group, None)
        for issue in (*run_checks(checked), *self._own_checks(checked)):
            issue = replace(issue, where=self.sources.where(issue.where, self._value(issue.where)))
            (self.warnings if issue.warning else self.problems).append(issue)

    def _made(self, where: str, data: Part) -> DataSource | None:
        environment = self.parts.get("environment", Part(None, None))
        try:
            return make_source(data.cls, data.config, self.available["seed"], environment.cls, environment.config)
        except Exception as error:  # a user's constructor may raise anything
            self.problems.append(ConfigIssue(where, f"cannot be made: {type(error).__name__}: {error}"))
            return None

    def _policies(self) -> tuple[Policy, ...]:
        model, wanted = self.available["model"], self.available.get("checkpoints", "last")
        if self.kind == "endpoint":
            return (Policy(0, model.url or ""),)
        if self.kind == "recorded":
            return (Policy(0, ""),)
        run = self.available.get("run")
        if run is None:
            if "checkpoints" in self.overrides.typed:
                self.problems.append(ConfigIssue("checkpoints", "has no effect without run=FOLDER"))
            return (Policy(0, model.path),)
        saved = {int(folder.name[5:]): folder / "policy" for folder in sealed_folders(run / "checkpoints")}
        there = {0: model.path, **{step: str(saved[step]) for step in sorted(saved)}}
        steps = sorted(there) if wanted == "all" else sorted(there)[-1:] if wanted == "last" else sorted(set(wanted))
        lacking = [step for step in steps if step not in there]
        if lacking or not saved:
            has = f"it has {', '.join(map(str, sorted(saved)))}" if saved else "it has none (trainer.save_every_steps)"
            where = f"checkpoints=[{','.join(map(str, lacking))}]" if lacking else f"run={run}"
            self.problems.append(ConfigIssue(where, f"{run} has no such checkpoint; {has}"))
        return tuple(Policy(step, there[step]) for step in steps if step in there)

    def _own_checks(self, checked: Mapping[str, Any]) -> Issues:
        evaluate, data = self.available.get("evaluate"), checked.get("data")
        judge, chooser = self._judges()
        for kind in ("reward", "verifier"):
            if kind in self.parts:
                yield from self._judge_fits(kind, self.parts[kind], data)
        if judge is not None and judge is not self.parts.get("verifier"):  # which a run's checks cover
            yield from held_out_sets_are_usable(checked.get("sets", {}), judge)
        if judge is None:
            for name, source in checked.get("sets", {}).items():
                messages = () if source is None else source.check()
                yield from (of_the_set(ConfigIssue(f"{SETS}.{name}", text), f"{SETS}.{name}") for text in messages)
        labelled = data is None or self.kind != "recorded" or "labels" in data.provides()
        if self.judged and judge is None and not labelled:
            yield ConfigIssue("reward", "nothing judges the answers: set reward=NAME, or use data with labels")
        if evaluate is not None and self.kind != "recorded":
            if not evaluate.samples and not evaluate.greedy:
                yield ConfigIssue("evaluate.samples", "is 0, so nothing is answered; add evaluate.greedy=true")
            if chooser is not None and evaluate.samples < 2:
                yield ConfigIssue(
                    "evaluate.samples",
                    f"{chooser.cls.__name__} chooses the best of several answers, so {evaluate.samples} is too few: "
                    "set at least 2, or leave out verifier or reward",
                    warning=True,
                )
        if evaluate is not None and evaluate.against and not (evaluate.against / "samples.jsonl").is_file():
            yield ConfigIssue("evaluate.against", f"there is no {evaluate.against}/samples.jsonl")
        yield from {"engine": self._engine, "endpoint": self._endpoint, "recorded": self._recorded}[self.kind](data)

    def _judge_fits(self, kind: str, part: Part, data: DataSource | None) -> Issues:
        traits, name = part.cls.traits(part.config), part.cls.__name__
        if traits.update_when != "none" or traits.follows_policy:
            yield ConfigIssue(kind, f"{name} learns in a run; here it must judge all answers in the same way")
        if kind == "verifier" and traits.answer and data is not None and "answer" not in data.provides():
            yield ConfigIssue(kind, f"{name} needs a gold answer to every question, but the data have none")
        if self.kind == "endpoint" and not traits.judges_texts:
            yield ConfigIssue(kind, f"{name} reads tokens, but an endpoint returns only texts")
        if self.kind == "recorded" and traits.environment:
            yield ConfigIssue(kind, f"{name} judges episodes, but recorded answers are not episodes")
        evaluate = self.available.get("evaluate")
        if evaluate is None or self.kind == "recorded" or traits.samples == 1:
            return
        if evaluate.greedy or 0 < evaluate.samples < traits.samples:
            yield ConfigIssue(
                "evaluate.greedy" if evaluate.greedy else "evaluate.samples",
                f"{name} compares {traits.samples} answers to a question with each other; there are fewer",
            )

    def _engine(self, data: DataSource | None) -> Issues:
        if (rollout := self.available.get("rollout")) is not None and rollout.source == "model":
            yield ConfigIssue("rollout.source", "is for training; the model that answers is model.path")
        for name in ("url", "name", "token_env"):
            if f"model.{name}" in self.overrides.typed:
                yield ConfigIssue(f"model.{name}", "is for model=endpoint")

    def _endpoint(self, data: DataSource | None) -> Issues:
        model = self.available.get("model")
        if model is None:
            return
        if model.url is None:
            yield ConfigIssue("model", "endpoint needs the server's address: model.url=http://127.0.0.1:8000/v1")
            return
        if problem := address_problem(model.url):
            yield ConfigIssue("model.url", problem)
        if model.token_env is not None and (problem := token_problem(model.url, model.token_env)):
            yield ConfigIssue("model.token_env", problem)
        if self.parts.get("environment") is not None:
            yield ConfigIssue("environment", "needs a policy that this command starts; name a folder with model.path")
        yield from self._idle("rollout", TO_ENDPOINT, "the server samples")
        yield from self._idle("model", ("url", "name", "token_env"), "the server has the model")

    def _recorded(self, data: DataSource | None) -> Issues:
        if data is not None and not data.provides() & {"responses", "references"}:
            yield ConfigIssue("data", "has no recorded answers; use data=responses data.path=FILE, or data=pairs")
        why = "the answers are recorded"
        if self.sets:
            yield ConfigIssue(SETS, f"has no effect: {why}; evaluate each set on its own (data=...)")
        yield from self._idle("evaluate", ("questions", "against"), why)
        yield from self._idle("rollout", ("source", "max_prompt_tokens", "max_response_tokens", "steps"), why)

    def _idle(self, section: str, used: Sequence[str], why: str) -> Iterator[ConfigIssue]:
        for key in sorted(self.overrides.typed):
            if key.startswith(f"{section}.") and key.split(".")[1] not in used:
                yield ConfigIssue(key, f"has no effect: {why}")

    def _judges(self) -> tuple[Part | None, Part | None]:
        reward, verifier = self.parts.get("reward"), self.parts.get("verifier")
        return (reward, None) if verifier is None else (verifier, reward)

    def result(self) -> Evaluating:
        if self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))
        full = {kind: {TARGET: None} for kind in self.contracts}
        full |= {
            kind: {TARGET: self.tree[kind][TARGET], **part.config.model_dump(mode="json")}
            for kind, part in self.parts.items()
        }
        judge, chooser = self._judges()
        return Evaluating(
            config=EvaluateRun(**self.available, **full),
            kind=self.kind,
            data=self.parts["data"],
            environment=self.parts.get("environment"),
            judge=judge,
            chooser=chooser,
            policies=self.policies,
            sets=self.sets,
            own_questions=self.own_questions,
            warnings=tuple(self.warnings),
        )


def _shape_or_error(path: str) -> Any:
    try:
        return check_model_folder(path)
    except ModelFolderError as error:
        return error
