"""`--help [SECTION ...]`: groups with their options, and keys with type, default and meaning, from the schema and
conf/; meanings of metrics, from metrics.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from rewards.base import Reward
from rlkit.config import metric_table
from rlkit.config.compose import (
    borrowed_options,
    default_options,
    group_options,
    headline,
    option_fields,
    option_text,
    option_values,
    values_of,
)
from rlkit.config.messages import ConfigError, ConfigIssue, all_fields, allowed, did_you_mean, section_type
from rlkit.config.parts import CONTRACTS, TARGET, PartError, conf_dir, import_part
from rlkit.config.schema import RunConfig
from rlkit.diagnostics.known import DIAGNOSTICS

USAGE = """\
[bold]python -m rlkit.train[/] \\[group=option ...] \\[key=value ...] \\[--config FILE]

  python -m rlkit.train algorithm=grpo reward=rule trainer.total_steps=200
  python -m rlkit.train 'reward=\\[rule,polar]' reward.parts.polar.weight=0.3
  python -m rlkit.train reward._target_=my_module.MyReward reward.my_key=3
  python -m rlkit.train --config runs/old/config.yaml learner.learning_rate=1e-5

  --config FILE  start from the values of a configuration file, for example an old run's
  dry_run=true   validate, print the plan, exit
  --help WORD    only this: a section (trainer), a part (reward), an option (reward=math, algorithm=ppo), a class of
                 yours (reward._target_=my_module.MyReward), keys with the word in their names (learning_rate), or a
                 metric (reward/mean; metrics: all of them)
  --version      print the version
"""


@dataclass(frozen=True)
class Block:
    """A heading with its keys."""

    title: str
    text: str
    fields: Sequence[tuple[str, FieldInfo]]
    names: frozenset[str]
    """Words that select the whole block."""
    sets: Mapping[str, Any]
    """Full key -> (value, the option that sets it), where the value is not the schema's default."""
    same_as: str = ""
    """The block that already lists its keys."""
    idle: frozenset[str] = frozenset()
    """Keys that have no effect with the values that the block sets."""


def print_help(words: Sequence[str] = ()) -> int:
    """Print all options and keys, or those that `words` select; return the exit code. Raises ConfigError for a word
    that matches nothing."""
    console, folder = Console(), conf_dir()
    options, chosen = group_options(folder), default_options(folder)
    words = [f"algorithm={word}" if word in options["algorithm"] else word for word in words]  # --help kto
    for group, option in (word.split("=", 1) for word in words if "=" in word):
        if group in options and option not in options[group]:
            message = f"no such option; {did_you_mean(option, options[group])}"
            raise ConfigError([ConfigIssue(f"--help {group}={option}", message)])
        if group in options:
            chosen[group] = option
    blocks = [*sections(values_of(chosen, folder)), *parts(options, chosen, words)]
    if not words:
        console.print(USAGE, highlight=False)
        _print_options(console, options, chosen)
        for block in blocks:
            _print_block(console, block)
        return 0
    for word in words:
        if word == "metrics":
            _print_metrics(console, metric_table.sections())
            continue
        asked_for = list(matching(word, blocks)) or list(option_block(word, options))
        if not asked_for and (rows := metric_table.named(word)):
            _print_metrics(console, {"": rows})
            continue
        if not asked_for:
            names = {name for block in blocks for name in (*block.names, *(key for key, _ in block.fields))}
            names |= {name for row in metric_table.rows() for name in row.names}
            message = f"no section, option, key or metric has this name; {_near(word, names)}"
            raise ConfigError([ConfigIssue(f"--help {word}", message)])
        if word in CONTRACTS:
            _print_part(console, word, options[word])
            continue
        for block in asked_for:
            _print_block(console, block)
    return 0


def _print_metrics(console: Console, listed: Mapping[str, Sequence[metric_table.MetricRow]]) -> None:
    """Print metrics by section with their meaning; those without a section also with how to read them."""
    for section, rows in listed.items():
        console.print(f"\n[bold]{escape(section)}[/]" if section else "", highlight=False)
        for row in rows:
            console.print(f"  [cyan]{escape(', '.join(row.names))}[/]", highlight=False, soft_wrap=True)
            texts = {"": row.meaning}
            if not section:
                texts |= {"how to read it: ": row.reading, "what to do: ": row.remedy}
            for title, text in texts.items():
                if text:
                    shown = escape(title + metric_table.plain(text))
                    console.print(Padding(shown, (0, 0, 0, 6)), highlight=False)


def _near(word: str, names: set[str]) -> str:
    text = did_you_mean(word, names).partition(" available: ")[0]
    return text if text.startswith("did") else "--help alone lists all keys, --help metrics all metrics"


def sections(values: Mapping[str, tuple[Any, str]]) -> Iterator[Block]:
    top = [(name, info) for name, info in RunConfig.model_fields.items() if section_type(info.annotation) is None]
    plain = [(name, info) for name, info in top if name not in CONTRACTS]
    yield Block("Run", "", plain, frozenset({"run"}), values)
    for name, info in RunConfig.model_fields.items():
        section = section_type(info.annotation)
        if section is not None:
            text = (section.__doc__ or "").strip()
            yield Block(name, text, list(all_fields(section, f"{name}.")), frozenset({name}), values)
    for name, cls in DIAGNOSTICS.items():
        fields = [(key, info) for key, info in all_fields(cls.Config) if key != "kind"]
        yield Block(f"diagnostic {{kind:{name}}}", headline(cls), fields, frozenset({"diagnostics"}), {})


def parts(
    options: Mapping[str, Sequence[str]], chosen: Mapping[str, str | None], words: Sequence[str]
) -> Iterator[Block]:
    borrowed, added = borrowed_options(conf_dir()), list[Block]()
    own = [word.split("=", 1) for word in words if f".{TARGET}=" in word]
    for kind in CONTRACTS:
        for key, target in own:
            if key == f"{kind}.{TARGET}":
                yield _class_block(kind, f"{key}={target}", target, {})
        if kind in borrowed:
            text = f"The options of {borrowed[kind]}=NAME, with the same fields."
            yield Block(f"{kind}=NAME", text, (), frozenset({kind}), {})
            continue
        listed: dict[Any, str] = {}
        for option in sorted(options[kind], key=lambda name: name != chosen[kind]):
            title = f"{kind}={option}"
            fields = option_fields(conf_dir(), kind, option)
            values = {key: (value, title) for key, value in option_values(kind, option).items()}
            block = _class_block(kind, title, fields.get(TARGET), values, listed)
            yield block
            cls = next((known for known, name in listed.items() if name == title), None)
            if isinstance(cls, type) and issubclass(cls, Reward):
                for section in cls.help_sections():
                    inner = [(key, info) for key, info in all_fields(section.model, section.prefix) if key != "kind"]
                    added.append(Block(section.title, section.text, inner, frozenset(), {}))
    yield from added


def _class_block(
    kind: str,
    title: str,
    target: Any,
    values: Mapping[str, tuple[Any, str]],
    listed: dict[Any, str] | None = None,
) -> Block:
    names = frozenset({title, kind})
    if target is None and CONTRACTS[kind].optional:
        return Block(title, f"No {kind}.", (), names, {})
    try:
        cls = import_part(kind, target)
    except PartError as error:
        return Block(title, f"{target} {error}", (), names, {})
    fields = list(all_fields(cls.Config, f"{kind}."))
    own = {key.rpartition(".")[2]: value for key, (value, _) in values.items() if key.startswith("algorithm.")}
    idle = cls.Config.model_construct(**own).idle() if kind == "algorithm" else ()
    first = title if listed is None else listed.setdefault(cls, title)
    same_as = "" if first == title else first
    return Block(title, headline(cls), fields, names, values, same_as, frozenset(f"{kind}.{name}" for name in idle))


def matching(word: str, blocks: Sequence[Block]) -> Iterator[Block]:
    """Yield the blocks of that name, or else the keys whose names contain the word."""
    named = [block for block in blocks if word in block.names]
    if named:
        for b in named:
            fields = [field for field in b.fields if field[0] not in b.idle]
            yield Block(b.title, recipe_text(b) or b.text, fields, b.names, b.sets)
    else:
        for block in blocks:
            fields = [(key, info) for key, info in block.fields if word in key]
            if fields and not block.same_as:
                yield Block(block.title, "", fields, block.names, block.sets)


def recipe_text(block: Block) -> str:
    """Return the text of an algorithm's recipe, which may set keys of other sections; empty for all other blocks."""
    kind, _, option = block.title.partition("=")
    if kind != "algorithm":
        return ""
    beside = [f"{key}={spelled(value)}" for key, (value, _) in block.sets.items() if not key.startswith("algorithm.")]
    return option_text(kind, option) + (f". Also sets {', '.join(beside)}, unless model=NAME does" if beside else "")


def option_block(word: str, options: Mapping[str, Sequence[str]]) -> Iterator[Block]:
    """Yield the block of an option that is not a class (`cluster=multi_gpu`), with what it sets; for a group alone, the
    blocks of its options."""
    group, _, option = word.partition("=")
    for name in options.get(group, ()) if not option else (option,):
        if group in options and name in options[group]:
            values = option_values(group, name)
            if group in CONTRACTS:  # the verifier's are the rewards'
                own = {key: (value, word) for key, value in values.items()}
                yield _class_block(group, word, values[f"{group}.{TARGET}"], own)
                continue
            text = ", ".join(f"{key}={spelled(value)}" for key, value in values.items())
            yield Block(f"{group}={name}", f"sets {text}" if text else "sets nothing", (), frozenset(), {})


def _print_part(console: Console, kind: str, names: Sequence[str]) -> None:
    console.print(f"\n[bold]{kind}=NAME[/] takes one of these; --help {kind}=NAME lists its keys.", highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name in names:
        table.add_row(name, escape(option_text(kind, name)))
    console.print(table)


def _print_options(console: Console, options: Mapping[str, Sequence[str]], chosen: Mapping[str, str | None]) -> None:
    table = Table("group", "options", box=None, padding=(0, 2), title="Options", title_justify="left")
    for group, names in options.items():
        marked = [f"[bold]{name}[/] (default)" if chosen.get(group) == name else name for name in names]
        table.add_row(group, ", ".join(marked))
    console.print(table)


def _print_block(console: Console, block: Block) -> None:
    if not block.same_as:
        print_section(console, block.title, block.text, block.fields, block.sets)
        return
    own = [f"{key}={spelled(value)}" for key, (value, _) in block.sets.items() if not key.endswith(TARGET)]
    text = f"Same keys as {block.same_as}; sets {', '.join(own)}" if own else f"Same keys as {block.same_as}"
    print_section(console, block.title, text, ())


def print_section(
    console: Console,
    title: str,
    text: str,
    fields: Iterable[tuple[str, FieldInfo]],
    values: Mapping[str, tuple[Any, str]] | None = None,
) -> None:
    """`values`: full key -> (value, option) of what options set instead of the default."""
    console.print(f"\n[bold]{escape(title)}[/]  {escape(text)}", highlight=False, soft_wrap=True)
    for key, info in fields:
        default = default_text(info, (values or {}).get(key))
        console.print(
            f"  [cyan]{escape(key)}[/]  {escape(allowed(info))}; {escape(default)}", highlight=False, soft_wrap=True
        )
        if info.description:
            text = " ".join(info.description.split())  # without the line breaks of the source
            console.print(Padding(escape(text), (0, 0, 0, 6)), highlight=False)


def default_text(info: FieldInfo, value: tuple[Any, str] | None) -> str:
    plain = "required" if info.is_required() else spelled(info.get_default(call_default_factory=True))
    if value is not None and not value[1]:
        return f"default {spelled(value[0])}"
    if value is None or value[0] == "???" or spelled(value[0]) == plain:
        return plain if info.is_required() else f"default {plain}"
    return f"default {spelled(value[0])} ({value[1]}; else {plain})"


def spelled(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(spelled(item) for item in value)}]" if isinstance(value, tuple | list) else str(value)
