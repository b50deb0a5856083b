"""Hydra's part: the groups in conf/, and one plain tree composed from the options chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import rlkit


def conf_dir() -> Path:
    """The folder of Hydra groups: inside an installed package, else beside it in a checkout.

    Raises FileNotFoundError if neither is there (an incomplete installation).
    """
    package = Path(rlkit.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml in {package} or beside it: rlkit is not completely installed")


def group_options(folder: Path) -> dict[str, list[str]]:
    """Group name -> its options, sorted; both are only file names. A folder with a `config.yaml` is no group of this
    command but another command's own groups."""
    return {
        group.name: sorted(file.stem for file in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir() and any(group.glob("*.yaml")) and not (group / "config.yaml").exists()
    }


def compose_options(folder: Path, choices: Mapping[str, str | None]) -> DictConfig:
    """The tree of `config.yaml` with the chosen options; the `hydra` node is kept for interpolations.

    Raises HydraException if the files of conf/ themselves are wrong.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        chosen = [f"{group}={'null' if option is None else option}" for group, option in choices.items()]
        tree = compose("config", overrides=chosen, return_hydra_config=True)
    OmegaConf.set_readonly(tree, False)
    OmegaConf.set_readonly(tree.hydra, False)
    OmegaConf.set_struct(tree, False)
    return tree


def option_fields(folder: Path, group: str, option: str) -> dict[str, Any]:
    """An option file by itself, as a plain dictionary."""
    content = OmegaConf.to_container(OmegaConf.load(folder / group / f"{option}.yaml"))
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}
