"""`evaluation`: how held-out problems are answered, further sets of them, and who judges; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlkit.config.loading import load_config
from rlkit.config.messages import ConfigError
from rlkit.config.parts import ResolvedRun, config_text
from rlkit.config.report import plan
from rlkit.data.base import DataError
from rlkit.data.files import FileSource, HfSource
from rlkit.prompts import load_prompts
from rlkit.tracking.run_folder import RunFolder
from rlkit.tracking.tracker import Tracker

Load = Callable[..., ResolvedRun]
Problems = Callable[..., list[str]]


def write(file: Path, count: int, **columns: str) -> Path:
    names = {"question": "question", "answer": "answer"} | columns
    rows = [{names["question"]: f"What is {i} + 3?", names["answer"]: f"#### {i + 3}"} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(*arguments: str, file: Path | None = None) -> ResolvedRun:
        first = () if file else ("reward=rule",)
        return load_config([f"run_dir={tmp_path / 'run'}", *first, *arguments], file)

    return load


@pytest.fixture
def problems(load: Load) -> Problems:
    def problems(*arguments: str) -> list[str]:
        with pytest.raises(ConfigError) as refused:
            load(*arguments)
        return [str(problem) for problem in refused.value.problems]

    return problems


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A run's own data, whose question stands in a column of another name."""
    file = write(tmp_path / "train.jsonl", 40, question="ask")
    return f"data=jsonl data.path={file} data.prompt_column=ask data.heldout_share=0.2 data.heldout_seed=3"


def test_a_set_takes_all_rows_of_its_file_with_the_columns_of_the_data(load: Load, own: str, tmp_path: Path) -> None:
    file = write(tmp_path / "more.jsonl", 7, question="ask")
    run = load(*own.split(), f"evaluation.sets.more.path={file}", "evaluation.sets.more.prompts=5")
    more = run.sets["more"]
    assert more.source is FileSource
    assert (more.config.prompt_column, more.prompts) == ("ask", 5)
    assert more.config.heldout_share is None
    assert run.config.evaluation.sets["more"]["path"] == str(file)
    loaded, bad = more.source(more.config, 0).load_set()
    assert [problem.answer for problem in loaded] == [str(i + 3) for i in range(7)]
    assert bad == []


def test_a_set_may_name_another_source_and_a_written_configuration_gives_the_same_sets(
    load: Load, own: str, tmp_path: Path
) -> None:
    one, two = write(tmp_path / "one.jsonl", 3), write(tmp_path / "two.json", 3, question="prompt")
    run = load(
        *own.split(),
        "evaluation.sets.one.data=jsonl",  # with GSM8K's columns, whatever the run's are
        f"evaluation.sets.one.path={one}",
        f"evaluation.sets.two={{data: hf, path: {two}, prompt_column: prompt}}",
        "evaluation.samples=4",
    )
    assert [(each.source, each.config.prompt_column) for each in run.sets.values()] == [
        (FileSource, "question"),
        (HfSource, "prompt"),
    ]
    written = tmp_path / "config.yaml"
    written.write_text(config_text(run.config))
    again = load_config([f"run_dir={tmp_path / 'run'}"], written)
    assert again.sets == run.sets
    assert again.config.evaluation == run.config.evaluation


def test_another_split_of_the_same_data_set(load: Load, tmp_path: Path) -> None:
    hf = load("data=hf", f"data.path={write(tmp_path / 'x.jsonl', 30)}", "evaluation.sets.test.split=train").sets[
        "test"
    ]
    assert hf.config.path.endswith("x.jsonl")
    assert hf.config.split == "train"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("evaluation.samples=4 evaluation.greedy=true", "evaluation.samples=4: 4 greedy responses"),
        ("evaluation.greedy=true evaluation.temperature=0.6", "evaluation.temperature=0.6: has no effect with"),
        ("evaluation.temperature=0", "evaluation.greedy=true takes the likeliest tokens"),
        ("evaluation.samples=0", "at least 1"),
        ("evaluation.sets.x.path=nowhere.jsonl evaluation.sets.x.data=jsonl", "sets.x.path=nowhere.jsonl: no"),
        ("evaluation.sets.x.data=jsonnl evaluation.sets.x.path=a", "no such option; did you mean jsonl?"),
        ("evaluation.sets.x.path=FILE",
         "Arithmetic does not have it; evaluation.sets.x.data=NAME takes another source"),
        ("evaluation.sets.x.prompts=3", "has no source of problems; write evaluation.sets.x.path=FILE"),
        ("evaluation.sets.x.data=jsonl evaluation.sets.x.path=FILE evaluation.sets.x.prompts=0", "at least 1"),
        ("evaluation.sets.x.data=jsonl evaluation.sets.x.path=FILE evaluation.sets.x.answer_colum=a",
         "did you mean evaluation.sets.x.answer_column?"),
        ("evaluation.sets.x.data=jsonl evaluation.sets.x.path=FILE evaluation.sets.x.prompt_column=ask",
         "set evaluation.sets.x.prompt_column"),
        ("evaluation.sets.x.data=jsonl evaluation.sets.x.path=GOLD evaluation.sets.x.answer_column=null",
         "MathReward needs answer with every prompt"),
        ("evaluation.sets.x-y.path=FILE", "only letters, digits and _"),
        ("verifier=group_length", "a held-out prompt has 1 (evaluation.samples)"),
        ("verifier=group_length evaluation.samples=2 algorithm=ppo algorithm.samples_per_prompt=1",
         "evaluation.training_answers"),
        ("evaluation.max_response_tokens=100000", "evaluation.max_response_tokens=100000: 640 prompt + 100000"),
        ("trainer.best_metric=evaluation/math/accurcy", "No metric of rlkit has this name"),
    ],
)  # fmt: skip
def test_what_is_refused(problems: Problems, tmp_path: Path, typed: str, words: str) -> None:
    file, gold = write(tmp_path / "some.jsonl", 5), write(tmp_path / "gold.jsonl", 5, answer="gold")
    typed = typed.replace("FILE", str(file)).replace("GOLD", str(gold))
    if "best_metric" in typed:  # a warning: a part of the user's may report it
        run = load_config([f"run_dir={tmp_path / 'run'}", "reward=rule", typed])
        assert any(words in str(warning) for warning in run.warnings)
        return
    assert any(words in line for line in problems(*typed.split())), problems(*typed.split())


def test_any_reward_judges_by_either_name(load: Load) -> None:
    run = load("verifier=length", "verifier.max_tokens=5")
    same = load("evaluation.reward=length", "evaluation.reward.max_tokens=5")
    assert run.config.verifier == same.config.verifier
    assert run.verifier_config.max_tokens == 5


def test_the_best_is_by_the_headline_unless_a_metric_is_named(load: Load, tmp_path: Path) -> None:
    file = write(tmp_path / "some.jsonl", 5)
    assert load().config.trainer.best_metric is None
    sets = ("evaluation.sets.m.data=jsonl", f"evaluation.sets.m.path={file}")
    for name in ("accuracy/heldout", "reward/heldout", "evaluation/pass@8", "evaluation/m/pass@2"):
        assert not load(f"trainer.best_metric={name}", *sets).warnings, name


def test_a_configuration_from_before_there_was_an_evaluation_section_loads(load: Load, tmp_path: Path) -> None:
    saved = yaml.safe_load(config_text(load().config))
    del saved["evaluation"]
    saved["trainer"]["best_metric"] = "accuracy/heldout"
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(saved))
    old = load(file=file).config
    assert old.trainer.best_metric == "accuracy/heldout"
    assert old.evaluation == load().config.evaluation


def prompts_of(run: ResolvedRun) -> tuple[dict[str, int], list[str]]:
    """Set -> number of prompts, and the warnings."""
    tracking = run.config.tracking.model_copy(update={"console": "off", "trackers": ()})
    with Tracker(tracking, RunFolder(run.config.run_dir), 1, capture_output=False) as tracker:
        heldout = load_prompts(run, tracker).heldout
        return {name: len(prompts) for name, prompts in heldout.items()}, list(tracker._progress.warnings)


def test_a_source_of_a_mixture_may_have_more_bad_rows_than_others(load: Load, tmp_path: Path) -> None:
    """Rows that one source may skip are not held against all of them."""
    good, poor = write(tmp_path / "good.jsonl", 60), write(tmp_path / "poor.jsonl", 60)
    poor.write_text("no JSON\n" * 6 + poor.read_text().replace("What is", "How much is"))
    mixture = ["data=mixture", f"data.sources.good.path={good}", f"data.sources.poor.path={poor}"]
    mixture += [f"data.sources.{name}.kind=jsonl" for name in ("good", "poor")]
    _, warnings = prompts_of(load(*mixture, "data.sources.poor.max_bad_row_share=0.2"))
    assert any("rows skipped" in line and "poor.jsonl:1" in line for line in warnings)


def test_sets_are_loaded_as_far_as_they_can_be_judged(load: Load, own: str, tmp_path: Path) -> None:
    file = write(tmp_path / "more.jsonl", 9, question="ask")
    sets = [f"evaluation.sets.{name}.path={file}" for name in ("more", "few")]
    run = load(*own.split(), *sets, "evaluation.sets.few.prompts=4", "trainer.evaluation_prompts=6")
    counts, warnings = prompts_of(run)
    assert counts == {"": 6, "more": 6, "few": 4}
    (overlap,) = [line for line in warnings if "also trained on" in line and ".more " in line]
    assert " of the 6 problems of evaluation.sets.more are also trained on" in overlap
    assert not [line for line in warnings if "not evaluated" in line]


def test_data_without_answers_are_evaluated_by_sets_alone_or_by_another_judge(load: Load, tmp_path: Path) -> None:
    train, more = write(tmp_path / "train.jsonl", 40), write(tmp_path / "more.jsonl", 3)
    plain = (
        "data=jsonl",
        f"data.path={train}",
        "data.answer_column=null",
        "reward=length",
        "reward.max_tokens=9",
        "trainer.prompts_per_step=4",
    )
    counts, warnings = prompts_of(load(*plain))
    assert counts == {}
    assert any("this run is not evaluated (another verifier=NAME may judge" in line for line in warnings)
    counts, _ = prompts_of(load(*plain, "verifier=length", "verifier.max_tokens=9", f"run_dir={tmp_path / 'b'}"))
    assert counts == {"": 2}
    counts, warnings = prompts_of(
        load(*plain, f"evaluation.sets.more={{data: jsonl, path: {more}}}", f"run_dir={tmp_path / 'c'}")
    )
    assert counts == {"more": 3}
    assert not any("not evaluated" in line for line in warnings)


def test_a_set_whose_rows_are_bad_is_named(load: Load, own: str, tmp_path: Path) -> None:
    file = write(tmp_path / "more.jsonl", 9, question="ask")
    run = load(*own.split(), f"evaluation.sets.more.path={file}")
    file.write_text(json.dumps({"ask": "", "answer": "#### 3"}) + "\n")
    with pytest.raises(DataError, match=r"evaluation\.sets\.more\.prompt_column"):
        prompts_of(run)


def test_fine_tuning_may_answer_problems_of_a_set(tmp_path: Path) -> None:
    """A set has problems to answer, whatever recorded responses the run learns from."""
    train, more = write(tmp_path / "train.jsonl", 40), write(tmp_path / "more.jsonl", 3)
    learning = ("algorithm=sft", "data=jsonl", f"data.path={train}", f"run_dir={tmp_path / 'run'}")
    run = load_config([*learning, "evaluation.generate=true", f"evaluation.sets.more.path={more}"])
    assert prompts_of(run)[0] == {"": 2, "more": 3}


def test_the_plan_counts_what_is_held_out_and_says_where_it_comes_from(load: Load, tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.jsonl", 100), write(tmp_path / "test.jsonl", 30, question="text")
    hard = [
        "evaluation.sets.hard.data=jsonl",
        f"evaluation.sets.hard.path={test}",
        "evaluation.sets.hard.prompt_column=text",
    ]

    def told(*arguments: str) -> dict[str, str]:
        lines = plan(load(*arguments))
        return {line.what: line.amount for line in lines if line.what.startswith("held out")}

    assert told("data=arithmetic", "data.heldout_problems=20") == {
        "held out": "20 problems, drawn (data.heldout_problems)"
    }
    words = ["data=jsonl", f"data.path={train}"]
    own = load(*words).source.load("heldout")[0]
    assert told(*words, *hard) == {
        "held out": f"{len(own)} problems, 0.05 of the questions in {train} (data.heldout_share)",
        "held out, hard": f"30 problems of {test} (evaluation.sets.hard)",
    }
    other = tmp_path / "other.jsonl"
    other.write_text(test.read_text().replace("text", "question").replace("is", "was"))
    assert told(*words, f"data.heldout_path={other}") == {
        "held out": f"30 problems, those in {other} (data.heldout_path)"
    }
