"""From command-line arguments to a checked configuration: compose, type every section, import the parts, check.

All issues are reported at once; nothing is started.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from rewards.base import Reward
from rlkit.config.checks import run_checks
from rlkit.config.compose import (
    Sources,
    add_parts,
    compose_options,
    default_options,
    group_options,
    in_home,
    in_part,
    merge_file,
    option_fields,
    set_value,
    unknown_parts,
    values_of,
)
from rlkit.config.engine import other_precision
from rlkit.config.heldout import HeldoutSets, with_whole_sets
from rlkit.config.machine import fits
from rlkit.config.messages import MISSING, ConfigError, ConfigIssue, all_fields, of_the_verifier, section_type, validate
from rlkit.config.overrides import Overrides, is_data_file, parse_overrides, read_by
from rlkit.config.parts import (
    CONTRACTS,
    TARGET,
    Contract,
    HeldoutSet,
    Part,
    PartError,
    ResolvedRun,
    conf_dir,
    import_part,
    make_source,
    with_present_targets,
)
from rlkit.config.plan import asks_reward, has_engines
from rlkit.config.schema import RunConfig
from rlkit.config.vocabulary import is_called
from rlkit.data.base import DataSource
from rlkit.experience.names import edits, nearest
from rlkit.experience.section import Section
from rlkit.models.folder import ModelFolderError, ModelShape, check_model_folder


class Loading:
    """One load: the tree, the source of each value, and the problems so far."""

    unread_sections: Collection[str] = ()  # of the configuration file

    def __init__(
        self,
        arguments: Sequence[str],
        file: Path | None,
        *,
        folder: Path,
        schema: type[Section],
        contracts: Mapping[str, Contract],
    ) -> None:
        self.folder, self.schema, self.contracts = folder, schema, contracts
        self.options = group_options(self.folder)
        self.overrides: Overrides = parse_overrides(arguments, self.options)
        self.problems = list(self.overrides.problems)
        self.warnings: list[ConfigIssue] = []
        self.sources = Sources(typed=self.overrides.typed)
        self.available: dict[str, Any] = {}
        self.parts: dict[str, Part] = {}
        self.sets: dict[str, HeldoutSet] = {}
        self.tree = self._compose(file)

    def _compose(self, file: Path | None) -> dict[str, Any]:
        try:
            composed = compose_options(self.folder, self.overrides.choices)
        except (HydraException, OmegaConfBaseException) as error:
            broken = ConfigIssue(str(self.folder), f"cannot be composed: {error}")
            raise ConfigError([*self.problems, broken]) from error
        if file is not None:
            self.problems += merge_file(composed, file, self.overrides.choices, self.sources, self.unread_sections)
        combined, problems = add_parts(composed, self.folder, self.options["reward"], self.overrides.parts, file)
        self.problems += problems
        targets = {kind: (composed.get(kind) or {}).get(TARGET) for kind in self.contracts}
        for kind in self.contracts:  # first the class: its fields may differ from those of the option's class
            chosen = self.overrides.values.get(f"{kind}.{TARGET}")
            if chosen is not None and chosen != targets[kind]:
                self._replace_part(composed, kind, chosen)
        picked = composed.hydra.runtime.choices
        self.sources.presets = values_of({name: picked.get(name) for name in default_options(self.folder)}, self.folder)
        self.sources.options = {kind: str(picked[kind]) for kind in self.contracts} | combined
        for key, value in self.overrides.values.items():
            set_value(composed, key, value)
        self._new_folder = "run_dir" not in self.overrides.values and OmegaConf.is_interpolation(composed, "run_dir")
        return self._plain(composed)

    def _replace_part(self, composed: DictConfig, kind: str, target: Any) -> None:
        """Replace an option by a user's class; the option's values are kept only for its subclasses."""
        try:
            inherits = issubclass(
                import_part(kind, target, self.contracts[kind]),
                import_part(kind, composed[kind].get(TARGET), self.contracts[kind]),
            )
        except PartError:
            inherits = False  # reported when the part is validated
        if not inherits:
            composed[kind] = {}
        composed.hydra.runtime.choices[kind] = str(target).rpartition(".")[2]

    def _plain(self, composed: DictConfig) -> dict[str, Any]:
        """Resolve interpolations node by node, so that one bad reference does not hide the others."""
        tree: dict[str, Any] = {}
        for key in (str(key) for key in composed if key != "hydra"):
            try:
                value = MISSING if OmegaConf.is_missing(composed, key) else composed[key]
                tree[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            except OmegaConfBaseException as error:
                self.overrides.unusable.add(key)
                where = getattr(error, "full_key", None) or key
                self.problems.append(ConfigIssue(self.sources.where(where, "..."), str(error).splitlines()[0]))
        present: dict[str, Any] = with_present_targets(in_home(tree))
        return present

    def validate(self) -> None:
        """Type every section and import the parts; whatever is valid becomes available to the checks."""
        configs = {kind: self._part_class(kind) for kind in self.contracts if kind not in self.overrides.unusable}
        known = self._known_keys(configs)
        for kind, cls in configs.items():
            if cls is not None:
                config = self._part_config(kind, cls, known)
                if config is not None:
                    self.parts[kind] = Part(cls, config)
        self._run_config(known)
        if (evaluation := self.available.get("evaluation")) is not None:
            data = self.tree["data"] if "data" in self.parts else None
            reading = HeldoutSets(self.folder, self.options["data"], data, self.sources.where)
            self.sets = reading.read_all(evaluation.sets)
            self.problems += reading.problems
            self.available["evaluation"] = with_whole_sets(evaluation, self.sets)

    def _part_config(self, kind: str, cls: Any, known: Sequence[str]) -> Any:
        reported = len(self.problems)
        config = self._typed_part(kind, cls, known)
        if kind == "verifier":  # a reward's own validators refer to `reward.x`
            self.problems[reported:] = map(of_the_verifier, self.problems[reported:])
        return config

    def _typed_part(self, kind: str, cls: Any, known: Sequence[str]) -> Any:
        fields = self._part_fields(kind)
        model = _model(cls, fields)
        if model is cls.Config:
            return self._section(model, fields, f"{kind}.", known, self._other_classes(kind, cls, fields))
        # A model with a typed section for each reward inside; it is used only for validation.
        reported = len(self.problems)
        typed = self._section(model, fields, f"{kind}.", known, unknown_parts(fields))
        self.problems[reported:] = map(in_part, self.problems[reported:])
        return None if typed is None else cls.Config(**fields)

    def _part_fields(self, kind: str) -> dict[str, Any]:
        return {key: value for key, value in self.tree[kind].items() if key != TARGET}

    def _known_keys(self, configs: Mapping[str, Any]) -> list[str]:
        known = [key for key, _ in all_fields(self.schema) if key not in self.contracts]
        for kind, cls in configs.items():
            if cls is not None:
                model = _model(cls, self._part_fields(kind))
                known += [f"{kind}.{TARGET}", *(key for key, _ in all_fields(model, f"{kind}."))]
        return known

    def _part_class(self, kind: str) -> Any:
        section = self.tree.get(kind)
        if not isinstance(section, dict):
            message = f"choose an option: {kind}={' or '.join(self.options.get(kind, []))}"
            self.problems.append(ConfigIssue(self.sources.where(kind, section), message))
            return None
        target = section.get(TARGET)
        if target is None and self.contracts[kind].optional:
            for key in self._part_fields(kind):
                options = " or ".join(f"{kind}={name}" for name in self.options.get(kind, []) if name != "none")
                message = f"has no effect: there is no {kind}; choose one with {options or f'{kind}.{TARGET}=CLASS'}"
                self.problems.append(ConfigIssue(self.sources.where(f"{kind}.{key}", section[key]), message))
            return None
        try:
            return import_part(kind, target, self.contracts[kind])
        except PartError as error:
            self.problems.append(ConfigIssue(self.sources.where(f"{kind}.{TARGET}", target), str(error)))
            return None

    def _run_config(self, known: Sequence[str]) -> None:
        """Type all sections of the schema, and the keys that belong to none."""
        for name, info in self.schema.model_fields.items():
            section = section_type(info.annotation)
            if section is None:
                continue
            content = self.tree.get(name) or {}
            if not isinstance(content, dict):
                message = f"is a section; set its keys one by one, like {name}.{next(iter(section.model_fields))}=VALUE"
                self.problems.append(ConfigIssue(self.sources.where(name, content), message))
                continue
            typed = self._section(section, content, f"{name}.", known)
            if typed is not None and name not in self.overrides.unusable:
                self.available[name] = typed
        rest = {key: value for key, value in self.tree.items() if not self._is_section(key)}
        stand_ins: dict[str, Any] = {kind: {} for kind in self.contracts}
        if "run_dir" not in rest:
            stand_ins["run_dir"] = "."  # its interpolation failed, which has been reported
        top = self._section(self.schema, {**rest, **stand_ins}, "", known)
        if top is not None:
            self.available |= {name: value for name, value in top if not self._is_section(name)}
            self.available["run_dir"] = Path(os.path.normpath(self.available["run_dir"].absolute()))
            if "run_dir" in self.overrides.unusable:
                del self.available["run_dir"]

    def _is_section(self, key: str) -> bool:
        info = self.schema.model_fields.get(key)
        return info is not None and (key in self.contracts or section_type(info.annotation) is not None)

    def _section(
        self,
        model: type[BaseModel],
        content: dict[str, Any],
        prefix: str,
        known: Sequence[str],
        notes: Mapping[str, str] | None = None,
    ) -> BaseModel | None:
        typed, problems = validate(model, content, prefix, known, self.sources.where, notes or {})
        self.problems += [problem for problem in problems if problem.where not in self.overrides.unread]
        return typed

    def _other_classes(self, kind: str, cls: Any, fields: Mapping[str, Any]) -> dict[str, str]:
        """Return notes on keys that this class lacks and that resemble none of its own: which options have them, or a
        key one edit away."""
        own = cls.Config.model_fields
        named = [key for key in fields if key in own or is_called(f"{kind}.{key}", {f"{kind}.{name}" for name in own})]
        unknown = [key for key in fields if key not in named and nearest(key, own) is None]
        having: dict[str, dict[str, list[str]]] = {key: {} for key in unknown}
        for option in self.options[kind] if unknown else ():
            try:
                other = import_part(kind, option_fields(self.folder, kind, option).get(TARGET), self.contracts[kind])
            except PartError:
                continue  # an option that is not chosen cannot make this run fail
            for key in unknown:
                for name in other.Config.model_fields:
                    if edits(key, name) <= 1:
                        having[key].setdefault(name, []).append(f"{kind}={option}")
        notes = {}
        for key, options in having.items():
            if name := key if key in options else next(iter(options), None):
                meant = "" if name == key else f"did you mean {kind}.{name}? "
                owners = options[name]
                *most, last = owners if len(owners) < 10 else [*owners[:8], f"{len(owners) - 8} more"]
                text = f"{', '.join(most)} and {last}" if most else last
                notes[f"{kind}.{key}"] = f"{meant}{cls.__name__} does not have it (it belongs to {text})"
        if "data.path" in notes and is_data_file(fields["path"]):
            notes["data.path"] = f"{cls.__name__} does not have it; {read_by(fields['path'])}"
        return notes

    def _value(self, key: str) -> Any:
        section, *steps = key.split(".")
        value = self.parts[section].config if section in self.parts else self.available.get(section)
        for step in steps:
            value = getattr(value, step, None)
        return value


def _model(cls: Any, fields: Mapping[str, Any]) -> type[BaseModel]:
    """Return a part's Config or, for a reward that combines others, a model with their sections."""
    model: type[BaseModel] = cls.config_model(fields) if issubclass(cls, Reward) else cls.Config
    return model


def load_config(
    arguments: Sequence[str], file: Path | None = None, elsewhere: Collection[str] | None = None, *, starts: bool = True
) -> ResolvedRun:
    """Load the run that Hydra overrides describe, on top of a file if given. Raises ConfigError with every problem.

    `elsewhere`: paths that may exist only on the other machines where the run will be; issues about them are warnings,
    and nothing is looked for on this machine. `starts`: the run itself will start, so it must fit.
    """
    loading = _RunLoading(arguments, file, elsewhere)
    loading.validate()
    loading.check()
    return loading.result(must_fit=starts)


class _RunLoading(Loading):
    def __init__(self, arguments: Sequence[str], file: Path | None, elsewhere: Collection[str] | None) -> None:
        super().__init__(arguments, file, folder=conf_dir(), schema=RunConfig, contracts=CONTRACTS)
        self.elsewhere = elsewhere
        self.source: Any = None

    def check(self) -> None:
        if "algorithm" in self.parts and "trainer" in self.available:
            part = self.parts["algorithm"]
            coarse = "rollout" in self.available and bool(other_precision(self.available["rollout"]))
            config = part.config.for_staleness(self.available["trainer"].max_staleness or int(coarse))
            self.parts["algorithm"] = replace(part, config=config)
        checked = dict(self.available)
        checked["typed"] = frozenset(self.overrides.typed)
        checked["new_folder"] = self._new_folder
        if self.elsewhere is None:
            checked["here"] = True
        if "model" in checked:
            checked["model_shape"] = _shape_or_error(checked["model"].path)
        if self.tree.get("environment") == {TARGET: None}:
            checked["environment"] = None
        for kind, part in self.parts.items():
            subject = self._make(kind, part)
            if subject is not None:
                checked[kind] = subject
        self.source = checked.get("data")
        checked["sets"] = {name: self._make("data", Part(one.source, one.config)) for name, one in self.sets.items()}
        self._leave_out_what_does_not_start(checked)
        for group in self.overrides.guessed:  # whether a guess fits with the rest is irrelevant
            checked.pop(group, None)
        self._report(run_checks(checked))

    def _leave_out_what_does_not_start(self, checked: dict[str, Any]) -> None:
        """Skip checks of what is not started: without engines, their options; parts that are, or may be, unused."""
        rollout, evaluation, algorithm = (checked.get(name) for name in ("rollout", "evaluation", "algorithm"))
        if rollout is None or algorithm is None or not asks_reward(rollout, algorithm):
            checked.pop("reward", None)
        if rollout is None or evaluation is None or rollout.source == "model" or not has_engines(rollout, evaluation):
            checked.pop("verifier", None)
        if rollout is not None and evaluation is not None and not has_engines(rollout, evaluation):
            self.available["rollout"] = checked["rollout"] = rollout.model_copy(update={"workers": 0})

    def _report(self, issues: Iterable[ConfigIssue]) -> None:
        for issue in issues:
            issue = replace(issue, where=self.sources.where(issue.where, self._value(issue.where)))
            harmless = issue.warning or (self.elsewhere is not None and self._is_about_here(str(issue)))
            (self.warnings if harmless else self.problems).append(issue)

    def _is_about_here(self, text: str) -> bool:
        """Whether the issue is about a path or a server that may exist where the run will be."""
        return "answers there" in text or any(path in text for path in self.elsewhere or ())

    def _make(self, kind: str, part: Part) -> Any:
        """Return what the checks get: the algorithm or data source itself, or a reward's class and configuration."""
        try:
            if kind == "algorithm":
                return part.cls(part.config)
            if kind == "data":
                return self._source(part)
        except Exception as error:  # a user's constructor may raise anything
            where = self.sources.where(f"{kind}.{TARGET}", self.tree[kind][TARGET])
            self.problems.append(ConfigIssue(where, f"cannot be created: {type(error).__name__}: {error}"))
            return None
        return part

    def _source(self, part: Part) -> Any:
        """Return the data source; None if something that it needs is invalid, which is reported elsewhere."""
        environment = self.parts.get("environment", Part(None, None))
        lacking = environment.cls is None and self.tree.get("environment") != {TARGET: None}
        if "seed" not in self.available or (lacking and part.cls.take_environment is not DataSource.take_environment):
            return None
        return make_source(part.cls, part.config, self.available["seed"], environment.cls, environment.config)

    def result(self, *, must_fit: bool) -> ResolvedRun:
        if self.problems:
            raise ConfigError(list(dict.fromkeys(self.problems)))
        full = {
            kind: {TARGET: self.tree[kind][TARGET], **part.config.model_dump(mode="json")}
            for kind, part in self.parts.items()
        }
        run = ResolvedRun(
            config=RunConfig(**self.available, **full),
            source=self.source,
            **{f"{kind}_class": part.cls for kind, part in self.parts.items()},
            **{f"{kind}_config": part.config for kind, part in self.parts.items()},
            origins={key: self.sources.origin(key) for key in ("learner.learning_rate", "critic.learning_rate")},
            sets=self.sets,
            elsewhere=self.elsewhere is not None,
        )
        with suppress(ModelFolderError):  # the model may exist only where the run will be
            self._report(fits(run) if must_fit else ())
        if self.problems:
            raise ConfigError(self.problems)
        return replace(run, warnings=tuple(self.warnings))


def _shape_or_error(path: str) -> ModelShape | ModelFolderError:
    try:
        return check_model_folder(path)
    except ModelFolderError as error:
        return error
