"""Training a preference model: the loss against published formulas, rows into pairs, and a model that learns."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reward_samples import make_group

from algorithms.functional.selection import expected_calibration_error
from rewards.base import RewardContext
from rewards.preference.learner import EncodedPair, measures, pair_losses, together
from rewards.preference.reward import PreferenceReward
from rlkit.data.base import DataError
from rlkit.experience import Message
from rlkit.reward_training.pairs import Pair, PairRows, all_pairs, load_pairs
from rlkit.train_reward import main

CHOSEN, REJECTED = np.array([1.5, -0.3, 0.9, 2.0]), np.array([0.2, 0.4, 0.9, -1.0])
MARGIN, PROBABILITY = np.array([0.0, 0.5, 0.25, 1.0]), np.array([1.0, 0.8, 0.5, 1.0])


def losses(centring: float = 0.0, margin: Any = MARGIN, probability: Any = PROBABILITY) -> tuple[Any, Any, Any]:
    """Loss and its gradients, in fp64."""
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in (CHOSEN, REJECTED))
    loss = pair_losses(chosen, rejected, torch.as_tensor(margin), torch.as_tensor(probability), centring)
    loss.sum().backward()
    return loss.detach().numpy(), chosen.grad.numpy(), rejected.grad.numpy()  # type: ignore[union-attr]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# ---- loss ------------------------------------------------------------------------------------------------------------


def test_loss_and_gradients_in_float64() -> None:
    centring = 0.01
    loss, of_chosen, of_rejected = losses(centring)
    d = CHOSEN - REJECTED - MARGIN
    centre = centring * (CHOSEN + REJECTED) ** 2
    expected = -PROBABILITY * np.log(sigmoid(d)) - (1 - PROBABILITY) * np.log(sigmoid(-d)) + centre
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    slope = sigmoid(d) - PROBABILITY
    np.testing.assert_allclose(of_chosen, slope + 2 * centring * (CHOSEN + REJECTED), rtol=1e-12)
    np.testing.assert_allclose(of_rejected, -slope + 2 * centring * (CHOSEN + REJECTED), rtol=1e-12)


def test_published_values() -> None:
    """Margin and label smoothing: the values of Secrets of RLHF II (gap 0.9, margin 0.7; smoothing 0.1)."""

    def one(gap: float, margin: float, probability: float) -> float:
        return float(pair_losses(*(torch.tensor([x]) for x in (gap, 0.0, margin, probability)), 0.0))

    assert one(0.9, 0.7, 1.0) == pytest.approx(0.598139, abs=1e-6)
    assert one(0.9, 0.0, 1.0) == pytest.approx(0.341154, abs=1e-6)
    assert one(0.9, 0.0, 0.9) == pytest.approx(0.431154, abs=1e-6)
    assert one(0.0, 0.0, 1.0) == pytest.approx(np.log(2))


def test_measures() -> None:
    found = measures(CHOSEN, REJECTED, np.array([1.0, 0.2, 1.0, 0.5]))
    assert found["accuracy"] == pytest.approx(
        2 / 3
    )  # right, right (rejected is likelier), a tie; the last is undecided
    assert found["margin"] == pytest.approx((CHOSEN - REJECTED).mean())
    assert measures(CHOSEN, CHOSEN, np.ones(4))["accuracy"] == 0.0


def test_calibration() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 200_000)
    assert (
        expected_calibration_error(confidence, (rng.uniform(size=200_000) < confidence).astype(float), bins=20) < 0.01
    )
    assert expected_calibration_error(np.full(100, 0.9), np.repeat([1.0, 0.0], [60, 40]), bins=20) == pytest.approx(0.3)
    assert expected_calibration_error(np.array([1.0]), np.array([0.0]), bins=20) == 1.0


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows_file(folder: Path, rows: list[Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def pairs_of(folder: Path, rows: list[Any], **options: Any) -> list[Pair]:
    prompts, _ = all_pairs(PairRows(path=rows_file(folder, rows), **options), seed=0)
    return [pair for prompt in prompts for pair in prompt]


def test_pairs_of_texts_and_of_chats(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hi"}
    answers = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    texts = {"prompt": "Hi", "chosen": "yes", "rejected": "no", "m": 0.5, "p": 0.75}
    chats = {"prompt": [user], "chosen": [answers[0]], "rejected": [answers[1]]}
    whole = {"chosen": [user, answers[0]], "rejected": [user, answers[1]]}
    expected = Pair((Message("user", "Hi"),), "yes", "no")
    for found in (pairs_of(tmp_path, [chats]), pairs_of(tmp_path, [whole], prompt_column=None)):
        assert [(p.prompt, p.chosen, p.rejected, p.margin, p.probability) for p in found] == [
            (expected.prompt, "yes", "no", 0.0, 1.0)
        ]
    (pair,) = pairs_of(tmp_path, [texts], margin_column="m", probability_column="p")
    assert (pair.margin, pair.probability) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, {}, "chosen and rejected are equal"),
        ({"prompt": "Hi", "chosen": "a"}, {}, "no column 'rejected' (it has prompt, chosen)"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, {}, "prompt is empty"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "p": 1.5}, {"probability_column": "p"}, "p is 1.5, not"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "m": "x"},
            {"margin_column": "m"},
            "m must be a finite number",
        ),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
            {"prompt_column": None},
            "chosen and rejected must be conversations that differ in the last message only",
        ),
    ],
)
def test_bad_rows_say_why(row: Any, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        pairs_of(tmp_path, [row], **options)
    assert f"rows.jsonl:1: {reason}" in str(error.value)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValidationError, match="label_key has no effect"):
        PairRows(path="x", label_key="ok")


def test_outcomes_become_pairs_of_one_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "A", "response": "right", "is_correct": True},
        {"prompt": "B", "response": "right", "is_correct": True},
        {"prompt": "B", "response": "also right", "is_correct": True},
        {"prompt": "A", "response": "wrong", "is_correct": False},
        {"prompt": "A", "response": "worse", "is_correct": -1},
        {"prompt": "A", "response": "right", "is_correct": True},
    ]
    found = {(p.prompt[0].content, p.chosen, p.rejected) for p in pairs_of(tmp_path, rows, form="outcomes")}
    assert found == {("A", "right", "wrong"), ("A", "right", "worse"), ("A", "wrong", "worse")}
    assert len(pairs_of(tmp_path, rows, form="outcomes", max_pairs_per_prompt=1)) == 1


def test_a_column_that_is_called_like_a_key_of_responses_stays_out_of_them(tmp_path: Path) -> None:
    rows = [
        {"prompt": "A", "response": text, "is_correct": ok, "solution": "the gold one"}
        for text, ok in (("right", True), ("wrong", False))
    ]
    (pair,) = pairs_of(tmp_path, rows, form="outcomes")
    assert (pair.chosen, pair.rejected) == ("right", "wrong")


def test_pairs_of_one_prompt_are_cut_where_they_are_too_many() -> None:
    prompt = (Message("user", "Which?"),)
    pairs = [
        EncodedPair(Pair(prompt, str(b), str(w)), (1, 2, *[b] * 30), (1, 2, *[w] * 30))
        for b in range(10, 14)
        for w in range(20, 24)
    ]
    (whole,) = together(pairs, None, 10_000)
    items = together(pairs, None, 200)
    assert whole.tokens > 200 and all(item.tokens <= 200 for item in items)
    assert [row for item in items for row in item.rows] == list(whole.rows)
    assert [len(item.pairs) for item in together(pairs, None, 1)] == [1] * 16


def test_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i % 50}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(200)]
    config = PairRows(path=rows_file(tmp_path, rows), heldout_share=0.3)
    train, heldout, _ = load_pairs(config, seed=0)
    sides = [{pairs[0].prompt for pairs in side} for side in (train, heldout)]
    assert not sides[0] & sides[1] and 5 < len(sides[1]) < 25
    fewer = PairRows(path=rows_file(tmp_path, rows[:100]), heldout_share=0.3)
    assert {pairs[0].prompt for pairs in load_pairs(fewer, 0)[1]} == sides[1]


def test_gsm8k_solutions_become_pairs(repository: Path) -> None:
    file = repository / "../shared/data/gsm8k/model_solutions.jsonl"
    if not file.is_file():
        pytest.skip("needs ../shared/data beside the project")
    columns = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    options = {"form": "outcomes", "prompt_column": "question", "response_columns": columns}
    prompts, bad = all_pairs(PairRows(path=str(file), **options), seed=0)
    assert not bad
    rows = {row["question"]: row for row in map(json.loads, file.read_text().splitlines())}
    for pairs in prompts:
        row = rows[pairs[0].prompt[0].content]
        right = {row[c]["solution"] for c in columns if row[c]["is_correct"]}
        wrong = {row[c]["solution"] for c in columns} - right
        assert {(p.chosen, p.rejected) for p in pairs} == {(a, b) for a in right for b in wrong}
    assert sum(map(len, prompts)) > 1000


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_prompt_and_a_response_in_several_pairs_are_packed_once() -> None:
    prompt = (Message("user", "Q"),)
    pairs = [
        EncodedPair(Pair(prompt, "a", "b"), (1, 2, 3, 9), (1, 2, 4, 9)),
        EncodedPair(Pair(prompt, "a", "c"), (1, 2, 3, 9), (1, 2, 5, 9)),
    ]
    (item,) = together(pairs, pad_id=0, limit=10_000)
    assert item.tree.prefix == (1, 2) and item.tree.suffixes == ((3, 9), (4, 9), (5, 9))
    assert item.pairs == ((0, 1), (0, 2))
    (padded,) = together(pairs[:1], pad_id=9, limit=10_000)
    assert padded.tree.suffixes == ((3,), (4,))


def easy_rows(count: int) -> list[dict[str, str]]:
    """Chosen ends with the sum, rejected apologises; the numbers differ."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        a, b = rng.randrange(2, 50), rng.randrange(2, 50)
        question = f"Tom has {a} apples. He buys {b} more. How many apples does Tom have now?"
        rows.append({"prompt": question, "chosen": f"{a}+{b}={a + b}\n#### {a + b}", "rejected": f"{a}, then {b}."})
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    code = main(
        [
            "reward=preference",
            f"data.path={rows_file(folder, easy_rows(160))}",
            f"run_dir={folder / 'run'}",
            "reward.steps=12",
            "reward.batch_size=16",
            "reward.learning_rate=1e-3",
            "reward.centring=0.01",
            "threads=1",
        ]
    )
    assert code == 0
    return folder


def test_training_begins_at_ln_2_and_learns(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "run/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "step" and line["step"] == 1)
    assert first["preference/loss"] == pytest.approx(np.log(2), abs=1e-6)
    summary = json.loads((trained / "run/summary.json").read_text())
    assert summary["before/accuracy"] == 0.0, "a head of zeros: all scores are equal"
    assert summary["after/accuracy"] > 0.9
    assert summary["after/margin"] > 0.2


def test_the_result_is_a_reward_and_scores_as_in_training(trained: Path) -> None:
    model = trained / "run/model"
    sample = json.loads((trained / "run/samples.jsonl").read_text().splitlines()[0])
    config = PreferenceReward.Config(model_path=str(model))
    assert PreferenceReward.check(config) == []
    reward = PreferenceReward(config, RewardContext())
    reward.start()
    question = sample["prompt"][0]["content"]
    (scores,) = reward.score([make_group("g", [sample["chosen"], sample["rejected"]], question=question)])
    found = [score.value for score in scores.samples]
    assert found == pytest.approx([sample["chosen_score"], sample["rejected_score"]], abs=1e-4)


def test_evaluate_measures_a_folder(trained: Path) -> None:
    rows = rows_file(trained, easy_rows(160)[-40:])
    arguments = ["reward=preference", "stage=evaluate", f"data.path={rows}", f"run_dir={trained / 'evaluated'}"]
    assert main([*arguments, f"reward.model_path={trained / 'run/model'}", "threads=1"]) == 0
    assert json.loads((trained / "evaluated/summary.json").read_text())["accuracy"] > 0.9


def test_evaluating_a_language_model_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_file(trained, easy_rows(8))
    arguments = ["reward=preference", "stage=evaluate", f"data.path={rows}", f"run_dir={trained / 'refused'}"]
    assert main([*arguments, "threads=1"]) == 1
    assert "holds a LlamaForCausalLM; a preference reward is a" in capsys.readouterr().err
