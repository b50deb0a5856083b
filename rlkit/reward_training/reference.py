"""`python -m rlkit.train_reward --help`: every backend, every key with type, default and meaning."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from rlkit.config.compose import group_options, option_fields
from rlkit.config.help import print_section
from rlkit.config.messages import all_fields
from rlkit.config.parts import TARGET, PartError, import_part
from rlkit.reward_training.base import TrainRewardConfig
from rlkit.reward_training.load import CONTRACTS, groups_dir

USAGE = """\
[bold]python -m rlkit.train_reward[/] reward=NAME data.path=FILE \\[key=value ...] \\[--config FILE]

  python -m rlkit.train_reward reward=implicit_prm data.path=rollouts.jsonl reward.model_path=path/to/model
  python -m rlkit.train_reward reward=implicit_prm stage=evaluate data.path=heldout.jsonl \\
      reward.model_path=runs/old/model reward.reference_path=path/to/model
  python -m rlkit.train_reward reward._target_=my_module.MyTraining data.path=rows.jsonl

  --config FILE  start from the values of a configuration file, for example an old run's
  dry_run=true   validate and exit
"""


def print_reference(console: Console) -> None:
    """Print the whole reference."""
    console.print(USAGE, highlight=False)
    top = [(name, info) for name, info in TrainRewardConfig.model_fields.items() if name not in ("reward", "data")]
    print_section(console, "Run", "", top)
    for option in group_options(groups_dir())["reward"]:
        target = option_fields(groups_dir(), "reward", option).get(TARGET)
        try:
            cls = import_part("reward", target, CONTRACTS["reward"])
        except PartError as error:
            console.print(f"\n[bold]reward={option}[/]: {escape(str(target))} {escape(str(error))}")
            continue
        text = (cls.__doc__ or "").strip().partition("\n")[0]
        print_section(console, f"reward={option}", text, all_fields(cls.Config, "reward."))
        print_section(console, f"data, with reward={option}", "", all_fields(cls.Data, "data."))
