"""`--help`: every group with its options, every key with its type, default and meaning, from the schema."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from rewards.base import HelpSection, Reward
from rlkit.config.compose import borrowed_options, default_options, group_options, option_fields
from rlkit.config.messages import all_fields, allowed, section_type
from rlkit.config.parts import CONTRACTS, PartError, conf_dir, import_part
from rlkit.config.schema import RunConfig

USAGE = """\
[bold]python -m rlkit.train[/] \\[group=option ...] \\[key=value ...] \\[--config FILE]

  python -m rlkit.train algorithm=grpo reward=rule trainer.total_steps=200
  python -m rlkit.train 'reward=\\[rule,polar]' reward.parts.polar.weight=0.3
  python -m rlkit.train reward._target_=my_module.MyReward reward.my_key=3
  python -m rlkit.train --config runs/old/config.yaml learner.learning_rate=1e-5

  --config FILE  start from the values of a configuration file, for example an old run's
  dry_run=true   validate, print the plan, exit
"""


def print_help() -> int:
    """Print the usage, all options and all keys; returns the exit code."""
    console = Console()
    console.print(USAGE, highlight=False)
    folder = conf_dir()
    options = group_options(folder)
    chosen = default_options(folder)
    table = Table("group", "options", box=None, padding=(0, 2), title="Options", title_justify="left")
    for group, names in options.items():
        marked = [f"[bold]{name}[/] (default)" if chosen.get(group) == name else name for name in names]
        table.add_row(group, ", ".join(marked))
    console.print(table)
    top = {name: info for name, info in RunConfig.model_fields.items() if section_type(info.annotation) is None}
    print_section(console, "Run", "", ((name, info) for name, info in top.items() if name not in CONTRACTS))
    for name, info in RunConfig.model_fields.items():
        section = section_type(info.annotation)
        if section is not None:
            print_section(console, name, section.__doc__ or "", all_fields(section, f"{name}."))
    borrowed, more = borrowed_options(folder), list[HelpSection]()
    for kind in CONTRACTS:
        if kind in borrowed:
            print_section(console, f"{kind}=NAME", f"The options of {borrowed[kind]}=NAME, with the same fields.", ())
            continue
        for option in options[kind]:
            target = option_fields(folder, kind, option).get("_target_")
            try:
                cls = import_part(kind, target)
            except PartError as error:
                console.print(f"\n[bold]{kind}={option}[/]: {escape(str(target))} {escape(str(error))}")
                continue
            print_section(console, f"{kind}={option}", headline(cls), all_fields(cls.Config, f"{kind}."))
            more += cls.help_sections() if issubclass(cls, Reward) else ()
    for added in more:
        fields = [(key, info) for key, info in all_fields(added.model, added.prefix) if key != "kind"]
        print_section(console, added.title, added.text, fields)
    return 0


def headline(cls: type) -> str:
    return (cls.__doc__ or sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")[0]


def print_section(console: Console, title: str, text: str, fields: Iterable[tuple[str, FieldInfo]]) -> None:
    console.print(f"\n[bold]{escape(title)}[/]  {escape(text)}", highlight=False)
    for key, info in fields:
        default = (
            "required" if info.is_required() else f"default {_spelled(info.get_default(call_default_factory=True))}"
        )
        console.print(f"  [cyan]{escape(key)}[/]  {escape(allowed(info))}; {escape(default)}", highlight=False)
        if info.description:
            console.print(Padding(escape(info.description), (0, 0, 0, 6)), highlight=False)


def _spelled(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)
