"""`tracking.trackers`: what is accepted, refused and written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import config_text
from rlkit.config.tracking import TrackingConfig


def kinds(config: TrackingConfig) -> list[str]:
    return [tracker.kind for tracker in config.trackers]


def report(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(list(arguments))
    return error.value.report()


def test_names_options_and_classes_are_read_and_written(tmp_path: Path) -> None:
    chosen = "tracking.trackers=[tensorboard,{kind:own_trackers.Remembering,shout:true}]"
    resolved = load_config([chosen, f"run_dir={tmp_path / 'run'}"])
    file = tmp_path / "config.yaml"
    file.write_text(config_text(resolved.config))
    again = load_config([f"run_dir={tmp_path / 'other'}"], file)
    for config in (resolved.config, again.config):
        assert kinds(config.tracking) == ["tensorboard", "own_trackers.Remembering"]
        assert config.tracking.trackers[1].shout is True  # type: ignore[attr-defined]


def test_the_older_key_still_says_whether_there_is_tensorboard(tmp_path: Path) -> None:
    assert kinds(TrackingConfig()) == ["tensorboard"]
    file = tmp_path / "config.yaml"
    for value, expected in (("true", ["tensorboard"]), ("false", [])):
        file.write_text(f"tracking: {{tensorboard: {value}, console: plain}}\n")
        for resolved in (load_config(["run_dir=x"], file), load_config([f"tracking.tensorboard={value}", "run_dir=x"])):
            assert kinds(resolved.config.tracking) == expected
            assert "tensorboard: " not in config_text(resolved.config)
    own = ["tracking.trackers=[own_trackers.Hanging]", "run_dir=x"]
    assert kinds(load_config(own, file).config.tracking) == ["own_trackers.Hanging"]
    assert "tensorboard=maybe must be true or false" in report("tracking.tensorboard=maybe")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("wandb", "must be a list, like [tensorboard,{kind:wandb,project:mine}]"),
        ("[wanddb]", "there is no kind 'wanddb'; did you mean wandb?"),
        ("[tensorboard,tensorboard]", "tensorboard is listed twice"),
        ("[{kind:wandb,projekt:x}]", "there is no option projekt; did you mean project?"),
        ("[{kind:wandb,api_key:x}]", "takes api_key only from the environment"),
        ("[{kind:mlflow,tracking_token:x}]", "takes tracking_token only from the environment"),
        ("[own_trackers.CALLS]", "is not a class"),
        ("[own_trackers.Nobody]", "has no Nobody"),
    ],
)
def test_mistakes_are_named(value: str, words: str) -> None:
    text = report(f"tracking.trackers={value}")
    assert "tracking.trackers" in text and words in text


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio", "swanlab"])
def test_a_missing_package_is_named_with_its_extra(kind: str) -> None:
    if find_spec(kind) is not None:
        assert kinds(load_config([f"tracking.trackers=[{kind}]", "run_dir=x"]).config.tracking) == [kind]
        return
    text = report(f"tracking.trackers=[tensorboard,{kind}]", "dry_run=true")
    assert f"{kind}: the package {kind} is not installed: pip install 'rlkit[{kind}]'" in text
