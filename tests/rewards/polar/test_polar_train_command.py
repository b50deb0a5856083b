"""`python -m rlkit.train_reward reward=polar`: every stage, on real rows and on a real pool."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from paths import SHARED
from reward_samples import make_group

from rewards.base import RewardContext
from rewards.polar.reward import PolarReward
from rlkit import train_reward

GSM8K = SHARED / "data" / "gsm8k" / "model_solutions.jsonl"
COLUMNS = "data.policy_columns={6b_finetuning: 6b, 6b_verification: 6b, 175b_finetuning: 175b, 175b_verification: 175b}"
SMALL = ["reward.steps=2", "reward.batch_size=8", "threads=1", "data.heldout_share=0.3"]


def run(*arguments: str) -> int:
    return train_reward.main(["reward=polar", *arguments])


@pytest.fixture(scope="module")
def solutions(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The 12 shortest of the 660 problems with the solutions of four real policies."""
    if not GSM8K.is_file():
        pytest.skip(f"needs {GSM8K}")
    lines = sorted(GSM8K.read_text().splitlines(), key=len)[:12]
    file = tmp_path_factory.mktemp("gsm8k") / "solutions.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_real_policies_are_learnt_from(stage: str, solutions: str, tmp_path: Path) -> None:
    out = tmp_path / stage
    columns = ["data.form=columns", "data.prompt_column=question", "data.reference_column=ground_truth", COLUMNS]
    assert run(f"stage={stage}", f"run_dir={out}", f"data.path={solutions}", *columns, *SMALL) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4), "a zero head: the first loss is ln 2"
    assert summary["triplets"] == len((out / "triplets.jsonl").read_text().splitlines()) > 5
    assert 0 < summary["after/same_versus_different_attainable"] <= 1
    assert {"after/right_versus_wrong_accuracy", "after/pearson"} <= set(summary)
    reward = PolarReward(PolarReward.Config(model_path=str(out / "model")), RewardContext(threads=1))  # type: ignore[call-arg]
    reward.start()
    (scores,) = reward.score([make_group("a", ["42", "41"])])
    assert scores.samples[0].valid and scores.samples[0].value != scores.samples[1].value
    reward.close()


def test_official_triplets_evaluate_the_embedded_discriminator(tmp_path: Path) -> None:
    rows = []
    for riders in range(3, 11):
        right, wrong = riders - 2, riders + 2
        texts = {"prompt": f"A bus has {riders} riders. 2 get off. How many riders are on the bus now?"}
        texts |= {
            "reference": f"{riders}-2={right}\n#### {right}",
            "chosen": f"#### {right}",
            "rejected": f"#### {wrong}",
        }
        rows.append({name: [{"role": "user", "content": text}] for name, text in texts.items()})
    file = tmp_path / "triplets.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    assert (
        run("stage=evaluate", "reward.model_path=embedded:polar", f"run_dir={out}", f"data.path={file}", "threads=1")
        == 0
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["right_versus_wrong_triplets"] == 8 and summary["right_versus_wrong_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=train"], "PolarTraining can only generate and pretrain and finetune and evaluate"),
        (["stage=pretrain", "reward.generation.policies={a: no/where, b: embedded:policy}"], "policies.a=no/where"),
        (["stage=finetune", "reward.modle_path=x"], "reward.modle_path"),
        (["stage=generate", "reward.generation.policies_per_prompt=1"], "policies_per_prompt"),
    ],
)
def test_wrong_configurations_end_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert run(f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'rows.jsonl'}", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=finetune", "reward.across_styles=true"], "reward.across_styles has no effect in stage=finetune"),
        (["stage=pretrain", "data.form=triplets"], "stage=pretrain reads trajectories or columns"),
        (["stage=generate"], "stage=generate needs two or more"),
        (["stage=pretrain"], "no column 'prompt'"),
    ],
)
def test_what_a_stage_cannot_use_is_said_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "?"}\n')
    assert run(f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'rows.jsonl'}", "threads=1", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_pool_is_sampled_and_learnt_from(tmp_path: Path) -> None:
    """generate, then pretrain. The two policies are one model, so nothing can be learnt: the way is the test."""
    from rlkit.data.arithmetic import ArithmeticConfig, draw_problems, write_solution

    problems = draw_problems(ArithmeticConfig(heldout_problems=16), "heldout")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": p.question, "gold": write_solution(p.steps, p.thing, "equations")} for p in problems]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool, out = tmp_path / "pool", tmp_path / "pretrained"
    generation = ["reward.generation.policies={one: embedded:policy, two: embedded:policy}"]
    generation += ["reward.generation.max_new_tokens=64", "data.reference_column=gold", "threads=1"]
    assert run("stage=generate", f"run_dir={pool}", f"data.path={prompts}", *generation) == 0
    written = [json.loads(line) for line in (pool / "trajectories.jsonl").read_text().splitlines()]
    assert len(written) == 16 * 2 * 2 and {row["policy"] for row in written} == {"one", "two"}
    assert len({row["response"] for row in written if row["prompt"] == problems[0].question}) > 1
    facts = json.loads((pool / "summary.json").read_text())["pool"]["one"]
    assert facts["responses"] == 32 and 0.05 < facts["accuracy"] < 0.7 and facts["finished"] > 0.5
    again = [f"run_dir={out}", f"data.path={pool / 'trajectories.jsonl'}", "data.label_column=correct"]
    assert run("stage=pretrain", *again, "data.reference_column=reference", *SMALL) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4) and summary["triplets"] > 10


@pytest.mark.slow
def test_a_policy_that_cannot_be_sampled_ends_the_run_with_the_cause(tmp_path: Path, capsys: Any) -> None:
    import shutil

    from rlkit.models.folder import EMBEDDED

    broken = tmp_path / "broken"
    shutil.copytree(EMBEDDED / "policy", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 320}))  # the weights have 256
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1?"}\n')
    pool = f"reward.generation.policies={{broken: {broken}, fine: embedded:policy}}"
    arguments = [f"run_dir={tmp_path / 'run'}", f"data.path={tmp_path / 'prompts.jsonl'}", "threads=1"]
    assert run("stage=generate", pool, *arguments) == 1
    said = capsys.readouterr().err
    assert "policy broken could not be sampled (exit code 1)" in said and "broken.log" in said
