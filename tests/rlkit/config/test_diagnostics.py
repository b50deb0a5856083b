"""`diagnostics=[...]`: names, options, classes of a user's, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import config_text

VERIFIED = "verifier=exact_match"
SEVERAL = "learner.minibatches_per_step=2"


def chosen(*arguments: str) -> list[tuple[str, str]]:
    config = load_config(["reward=rule", *arguments]).config
    return [(part.kind, part.alarm) for part in config.diagnostics]


def problem(*arguments: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(["reward=rule", *arguments])
    return str(refused.value)


def test_names_and_options_are_read_and_written(tmp_path: Path) -> None:
    assert chosen() == [("hacking", "warn")]
    assert chosen("diagnostics=[]") == []
    listed = "diagnostics=[hacking,drift,ratio_shift,{kind:starc,alarm:stop},reward_gap,{kind:judge_fpr,every_steps:5}]"
    config = load_config(["reward=rule", listed, VERIFIED, SEVERAL]).config
    file = tmp_path / "config.yaml"
    file.write_text(config_text(config))
    assert {"kind": "judge_fpr", "alarm": "stop", "every_steps": 5, "questions": 4, "max_rate": 0.0} in yaml.safe_load(
        file.read_text()
    )["diagnostics"]
    again = load_config([f"run_dir={tmp_path / 'again'}"], file=file).config
    assert again.diagnostics == config.diagnostics


def test_a_class_of_a_users_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_diagnostics_of_a_user.py").write_text(
        "from rlkit.diagnostics.base import Diagnostic, Findings\n\n\n"
        "class Mine(Diagnostic):\n    def check(self, record):\n        return Findings()\n\n\n"
        "class Half(Diagnostic): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert chosen("diagnostics=[own_diagnostics_of_a_user.Mine]") == [("own_diagnostics_of_a_user.Mine", "warn")]
    assert "lacks check(), which every diagnostic must have" in problem("diagnostics=[own_diagnostics_of_a_user.Half]")
    assert "has no Nine; did you mean" in problem("diagnostics=[own_diagnostics_of_a_user.Nine]")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["diagnostics=[hackin]"], "diagnostic 1: there is no kind 'hackin'; did you mean hacking?"),
        (["diagnostics=hacking"], "must be a list, like [hacking,"),
        (
            ["diagnostics=[{kind:drift,max_k:1}]"],
            "(drift): there is no option max_k; did you mean max_kl?",
        ),
        (["diagnostics=[{kind:drift,alarm:halt}]"], "alarm=halt must be one of warn, stop"),
        (["diagnostics=[drift,drift]"], "drift is listed twice"),
        (["diagnostics=[ratio_shift]"], "ratio_shift: has no effect: with one optimizer step per training step"),
        (["diagnostics=[drift]", "algorithm=rloo"], "drift: compares with the reference policy"),
        (["diagnostics=[starc]"], "starc: there is no verifier to compare with: it is the reward itself"),
        (["diagnostics=[{kind:reward_gap,column:level}]", VERIFIED], "column=level: the data have no such column"),
        (["diagnostics=[judge_fpr]", "reward=polar"], "judge_fpr: the reward gives raw scores"),
        (["diagnostics=[judge_fpr]", "reward=implicit_prm"], "judge_fpr: the reward judges tokens"),
        (["diagnostics=[]", "trainer.hacking_alarm_steps=3"], "`hacking` is not among the diagnostics"),
    ],
)
def test_what_cannot_work_or_has_no_effect_is_refused(arguments: list[str], text: str) -> None:
    assert text in problem(*arguments)
