"""The configuration of `python -m rlkit.serve`: everything wrong is said before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlkit.config.messages import ConfigError
from rlkit.serve import main
from rlkit.serving.http.process import model_version
from rlkit.serving.http.run import load_serve_config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "reward: choose what to serve"),
        (("reward=rul",), "reward=rul: no such option; did you mean rule?"),
        (("reward=rule", "reward.fomat_weight=1"), "did you mean reward.format_weight?"),
        (("reward=rule", "serve.prt=1"), "serve.prt=1: no such key; did you mean serve.port?"),
        (("reward=rule", "serve.port=70000"), "must be an integer, at least 0 and at most 65535"),
        (("reward=rule", "serve=3"), "is a section; set its keys one by one"),
        (("reward=rule", "trainer.total_steps=3"), "has no effect in rlkit.serve"),
        (("reward=rule", "serve.host=0.0.0.0"), "so requests must carry a token"),
        (("reward=rule", "serve.host=::"), "so requests must carry a token"),
        (("reward=rule", "serve.token_env=NOT_SET"), "the environment has no NOT_SET"),
        (("reward=rule", "serve.host=0.0.0.0", "serve.token_env=SHORT"), "at least 16 ASCII characters"),
        (("reward=function", "reward.function=reward_functions.word"), "reward_functions has no word"),
        (("reward=[math,environment]",), "judges episodes as they were played, and these are not sent"),
    ],
)
def test_what_is_wrong_is_found_before_anything_starts(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHORT", "secret")
    with pytest.raises(ConfigError) as error:
        load_serve_config(arguments)
    (problem,) = error.value.problems
    assert said in str(problem)


def test_all_problems_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward=rule", "reward.cache_size=0", "serve.port=-1", "learner.ranks=2"]) == 2
    assert "3 problems" in capsys.readouterr().err
    assert (
        main(["reward=[math,function]", "reward.parts.function.function=reward_functions.words", "dry_run=true"]) == 0
    )
    assert main(["--help"]) == 0
    assert "serve.max_queued_samples" in capsys.readouterr().out


def test_the_name_of_a_model_changes_with_its_files_and_options(tmp_path: Path) -> None:
    reward = {"_target_": "a.B", "path": str(tmp_path), "scale": 1}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 10)
    first = model_version(reward)
    assert first.startswith("B-")
    assert model_version(dict(reward)) == first
    assert model_version({**reward, "scale": 2}) != first
    (tmp_path / "model.safetensors").write_bytes(b"0" * 9 + b"1")
    assert model_version(reward) != first
