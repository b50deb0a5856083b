"""Training POLAR: rows, triplets, trimming, the loss, and what a discriminator may start from."""

from __future__ import annotations

import json
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import SHARED
from polar_fixture import char_tokenizer, tiny_discriminator
from pydantic import ValidationError

from rewards.polar.generation import trim, without_loops, without_unfinished_end
from rewards.polar.serialise import Limits, Serialiser
from rewards.polar.triplets import (
    PolarRows,
    PromptRows,
    Trajectory,
    Triplet,
    labelled_triplets,
    policy_triplets,
    read,
    read_split,
    rival_pairs,
)
from rlkit.data.base import DataError
from rlkit.reward_training.rows import draw_batches

GSM8K = SHARED / "data" / "gsm8k" / "model_solutions.jsonl"
FOUR = {"6b_finetuning": "6b", "6b_verification": "6b", "175b_finetuning": "175b", "175b_verification": "175b"}


def rows_of(tmp_path: Path, rows: list[Any], **options: Any) -> PolarRows:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PolarRows(path=str(file), **options)


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_single_responses_come_together_by_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1?", "response": "2", "policy": "a", "how": "plain", "ok": True, "gold": "two: 2"},
        {"prompt": "1+1?", "response": "3", "policy": "b", "how": "plain", "ok": None, "gold": "two: 2"},
        {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2?"}], "response": "4"}
        | {"policy": "a", "how": "long", "ok": 0, "gold": [{"role": "assistant", "content": "4"}]},
    ]
    config = rows_of(tmp_path, rows, style_column="how", label_column="ok", reference_column="gold")
    (first, second), bad = read(config, "trajectories")
    assert bad == []
    assert first.trajectories == [Trajectory("2", "a", "plain", True), Trajectory("3", "b", "plain", None)]
    assert (second.prompt, second.reference) == ("Add.\n2+2?", "4")
    assert second.trajectories == [Trajectory("4", "a", "long", False)]


def test_columns_of_one_policy_are_its_responses(tmp_path: Path) -> None:
    row = {
        "q": "1+1?",
        "x": {"solution": "2", "is_correct": True},
        "y": {"solution": "2!", "is_correct": False},
        "z": "3",
    }
    config = rows_of(tmp_path, [row], form="columns", prompt_column="q", policy_columns={"x": "a", "y": "a", "z": "b"})
    (asked,), _ = read(config, "columns")
    assert asked.trajectories == [
        Trajectory("2", "a", "", True),
        Trajectory("2!", "a", "", False),
        Trajectory("3", "b"),
    ]


def test_unusable_rows_are_named_and_too_many_stop(tmp_path: Path) -> None:
    good = {"prompt": "p", "reference": "r", "chosen": "c", "rejected": "x"}
    bad = [{**good, "rejected": "c"}, {"prompt": "p"}, {**good, "chosen": 7}, {**good, "reference": None}]
    asked, reasons = read(rows_of(tmp_path, [good, *bad], max_bad_row_share=0.9), "triplets")
    assert asked[0].triplets == [Triplet("p", "r", "c", "x")]
    assert [row.reason for row in reasons] == [
        "chosen and rejected are equal",
        "no column 'reference' (it has prompt)",
        "chosen must be a text or a list of messages, not int",
        "reference is null",
    ]
    with pytest.raises(DataError, match="4 of 5 rows cannot be used"):
        read(rows_of(tmp_path, [good, *bad]), "triplets")


def test_held_out_prompts_do_not_move_and_keep_their_rows_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 40}", "response": f"r{i}", "policy": "a"} for i in range(120)]
    train, heldout, _ = read_split(rows_of(tmp_path, rows, heldout_share=0.3), "trajectories")
    assert len(train) + len(heldout) == 40 and 5 <= len(heldout) <= 20
    assert all(len(asked.trajectories) == 3 for asked in [*train, *heldout])
    _, fewer, _ = read_split(rows_of(tmp_path, rows[:60], heldout_share=0.3), "trajectories")
    assert {asked.prompt for asked in fewer} == {asked.prompt for asked in heldout}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "triplets", "policy_column": "who"}, "policy_column has no effect with data.form=triplets"),
        ({"form": "columns"}, "needs data.policy_columns"),
        ({"form": "trajectories", "label_key": "x"}, "label_key has no effect"),
        ({"heldout_share": 0.2, "heldout_path": "x"}, "heldout_share has no effect"),
    ],
)
def test_row_options_that_cannot_act_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PolarRows(path="x", **options)


# ---- triplets --------------------------------------------------------------------------------------------------------


def test_a_triplet_never_mixes_styles() -> None:
    answers = {
        ("good", "plain"): [["g1", "g2", "g3"], ["g4"]],
        ("bad", "plain"): [["b1", "g3"], ["b3", "b4"]],
        ("good", "fancy"): [["G1", "G2"], ["G3", "G4"]],
    }
    groups = policy_triplets(["p", "q"], answers, lambda key: key[1])
    assert groups == [
        [Triplet("p", "g1", "g2", "b1")],  # the next pair (g2, g3) has the candidate g3 on both sides
        [Triplet("p", "b1", "g3", "g1")],
        [Triplet("q", "b3", "b4", "g4")],
    ]
    mixed = policy_triplets(["p", "q"], answers, lambda key: "")
    assert len(rival_pairs(list(answers), lambda key: "")) == 6
    assert [Triplet("p", "G1", "G2", "g1"), Triplet("p", "G1", "G2", "b1")] in mixed


def test_right_is_put_above_wrong() -> None:
    assert labelled_triplets("p", "gold", ["r", "r"], ["w1", "w2"]) == [
        Triplet("p", "gold", "r", "w1"),
        Triplet("p", "gold", "r", "w2"),
    ]
    assert labelled_triplets("p", None, ["r1", "r2"], ["w"]) == [Triplet("p", "r1", "r2", "w")]
    assert labelled_triplets("p", None, ["r1"], ["w"]) == [], "one right answer cannot be its own reference"
    assert labelled_triplets("p", "gold", [], ["w"]) == []


def test_batches_have_the_size_asked_for_and_epochs_are_shuffled() -> None:
    groups = [[Triplet(f"p{i}", "r", "c", f"x{j}") for j in range(3)] for i in range(5)]
    batches = list(islice(draw_batches(groups, 4, "shuffled/0"), 15))
    assert {len(batch) for batch in batches} == {4}
    flat = [triplet for batch in batches for triplet in batch]
    for epoch in range(4):
        assert sorted(flat[15 * epoch : 15 * (epoch + 1)], key=str) == sorted(
            (triplet for group in groups for triplet in group), key=str
        )
    assert flat[:15] != flat[15:30]
    assert flat[:4] == next(draw_batches(groups, 4, "shuffled/0")), "seeded"


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"needs {GSM8K}")
def test_four_real_policies_give_both_kinds_of_triplets() -> None:
    from rewards.polar.learner import final
    from rewards.polar.triplets import attainable_accuracy, contrasts, verdicts

    config = PolarRows(
        path=str(GSM8K), form="columns", prompt_column="question", reference_column="ground_truth", policy_columns=FOUR
    )
    asked, bad = read(config, "columns")
    assert len(asked) == 660 and bad == []
    told_apart = [triplet for group in contrasts(asked, ["6b", "175b"]) for triplet in group]
    assert 1200 <= len(told_apart) <= 1320, "two for every prompt, but for equal candidates"
    # Models of one size agree little more than models of two sizes.
    assert 0.5 < attainable_accuracy(told_apart, final) < 0.55
    judged = [triplet for group in verdicts(asked) for triplet in group]
    right = {(a.prompt, t.text) for a in asked for t in a.trajectories if t.correct}
    assert len(judged) > 1000
    assert all((t.prompt, t.chosen) in right and (t.prompt, t.rejected) not in right for t in judged)


# ---- trimming --------------------------------------------------------------------------------------------------------


def test_loops_are_cut_but_stay_loops() -> None:
    looped = "Let me think. " + "I do not know. " * 40
    assert without_loops(looped) == "Let me think. " + "I do not know. " * 3
    rule = "| --- | --- | --- | --- | --- |\n" + "=" * 40 + " 1000000000"
    assert without_loops(rule) == rule, "short repetition is no loop"


def test_unfinished_endings_go() -> None:
    assert without_unfinished_end("One. Two? Three and") == "One. Two?"
    assert without_unfinished_end("a = 1.5\nb = 2.") == "a = 1.5", "a point inside a number ends nothing"
    assert without_unfinished_end("一。二。三") == "一。二。"
    assert without_unfinished_end("no end at all") == "no end at all"
    assert trim("All said. And", finished=True) == "All said. And"
    assert trim("All said. And", finished=False) == "All said."


def test_trimming_a_long_response_is_quick() -> None:
    text = " ".join(f"word{i}" for i in range(4096))
    began = time.perf_counter()
    assert without_loops(text) == text
    assert time.perf_counter() - began < 10


# ---- measures --------------------------------------------------------------------------------------------------------


def test_correlations() -> None:
    from rewards.polar.learner import correlation, final, ranks

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(size=50)
    assert correlation(x.tolist(), y.tolist()) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    assert correlation(ranks([1.0, 2.0, 30.0]), ranks([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    assert correlation([1.0, 1.0], [0.0, 1.0]) == 0.0
    assert final("3*4=12\n#### 12") == "12" and final(" twelve ") == "twelve"


# ---- the loss, and where it starts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group() -> None:
    import socket

    import torch.distributed as dist

    from rlkit.learner.engine import init_process_group

    if not dist.is_initialized():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        init_process_group(0, 1, "127.0.0.1", port, "cpu")


PAIRS = [(0, 0), (1, 0), (2, 1), (0, 3), (-0.5702977776527405, -11.030370712280273), (0.054595947265625, -2.005859375)]
PAIRS += [(-7.10546875, -7.1328125), (-20, 20), (20, -20)]
LOSSES = [0.693147180560, 0.313261687518, 0.313261687518, 3.048587351573, 2.86577322823e-05, 0.119910504743]
LOSSES += [0.679568762732, 40.0, 4.24835e-18]
SLOPES = [-0.5, -0.268941421, -0.268941421, -0.952574127, -2.86573217e-05, -0.113000185, -0.493164488, -1.0, 0.0]


def test_the_pair_loss_is_the_oracles(process_group: None, tmp_path: Path) -> None:
    import torch

    from rewards.polar.learner import PolarLearner
    from rlkit.config.schema import LearnerConfig

    folder = tiny_discriminator(tmp_path)
    learner = PolarLearner(folder, LearnerConfig(), device="cpu", total_steps=1, limits=Limits(504, 126))
    comparisons = learner.comparisons([Triplet(f"p{i}", "r", "c", "x") for i in range(len(PAIRS))])
    scores = torch.tensor([score for pair in PAIRS for score in pair], dtype=torch.float64, requires_grad=True)
    total = learner._loss(lambda packed: scores, comparisons)
    assert total.item() == pytest.approx(sum(LOSSES), rel=1e-9)
    (gradient,) = torch.autograd.grad(total, scores)
    assert gradient[::2].tolist() == pytest.approx(SLOPES, abs=1e-8)
    assert gradient[1::2].tolist() == pytest.approx([-slope for slope in SLOPES], abs=1e-8)


def test_all_candidates_of_a_comparison_see_the_same_prompt(process_group: None, tmp_path: Path) -> None:
    from rewards.polar.learner import PolarLearner
    from rlkit.config.schema import LearnerConfig

    folder = tiny_discriminator(tmp_path)
    learner = PolarLearner(folder, LearnerConfig(), device="cpu", total_steps=1, limits=Limits(100, 30))
    prompt = "".join(chr(97 + i % 26) for i in range(200))
    (comparison,) = learner.comparisons([Triplet(prompt, "r", "short", "l" * 30)])
    texts = [learner.tokenizer.decode([*comparison.tree.prefix, *suffix]) for suffix in comparison.tree.suffixes]
    halves = [text.split("<|reward|>") for text in texts]
    assert halves[0][0] == halves[1][0]
    kept = halves[0][0].removeprefix("<s>").removesuffix("\nr")
    assert prompt.endswith(kept) and len(kept) == (100 - 4 - 2 - 30) // 2, "cut for the longer of the two"
    alone = Serialiser(char_tokenizer(), Limits(100, 30)).text(prompt, "r", "short")
    assert len(alone) > len(texts[0]), "scored alone, the shorter one would see more"


def test_a_language_model_without_the_markers_can_be_a_start(process_group: None, tmp_path: Path) -> None:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rewards.polar.learner import PolarLearner
    from rlkit.config.schema import LearnerConfig

    characters = ["<pad>", "</s>", *(chr(code) for code in (10, *range(32, 127)))]
    backend = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    learner = PolarLearner(
        tmp_path / "lm", LearnerConfig(learning_rate=1e-2), device="cpu", total_steps=4, limits=Limits(200, 50)
    )
    triplets = [Triplet("1+1=", "2", "2", str(wrong)) for wrong in range(3, 9)]
    assert learner.step(triplets) == pytest.approx(math.log(2), abs=1e-6)
    for _ in range(3):
        learner.step(triplets)
    learner.save(tmp_path / "polar")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "polar")
    again = PolarLearner(tmp_path / "polar", LearnerConfig(), device="cpu", total_steps=1, limits=Limits(200, 50))
    ids = again.tokenizer.encode("1+1=\n2<|reward|>1+1=\n2[UNUSED_TOKEN_130]")
    assert ids[-1] == len(tokenizer) + 1 and saved.config.vocab_size == len(tokenizer) + 2
    with torch.no_grad():
        plain = saved(input_ids=torch.tensor([ids])).logits.item()
    assert again.scores([("1+1=", "2", "2")]) == pytest.approx([plain], abs=1e-5)
    assert plain != 0.0


def test_measures_of_a_trained_discriminator(process_group: None) -> None:
    """The embedded one, on answers whose quality is known."""
    import random

    from examples.embedded_models.corpora import careless_solution
    from examples.embedded_models.pairs import is_right
    from rewards.polar.learner import PolarLearner, measure
    from rlkit.config.schema import LearnerConfig
    from rlkit.data.arithmetic import ArithmeticConfig, draw_problems, write_solution
    from rlkit.models.folder import EMBEDDED

    rng = random.Random(0)
    asked = []
    for problem in draw_problems(ArithmeticConfig(heldout_problems=24), "heldout"):
        each = PromptRows(problem.question, write_solution(problem.steps, problem.thing, "equations"))
        for policy, rate in (("careful", 0.0), ("careless", 0.8)):
            for _ in range(2):
                text = careless_solution(problem, "equations", rate, rng)
                each.trajectories.append(Trajectory(text, policy, "equations", is_right(text, problem.answer)))
        asked.append(each)
    limits = Limits(1016, 254)
    learner = PolarLearner(EMBEDDED / "polar", LearnerConfig(), device="cpu", total_steps=1, limits=limits)
    found = measure(learner, asked, ["careful", "careless"])
    assert found["right_versus_wrong_accuracy"] > 0.95
    # Over all prompts together, whose scores have no common zero.
    assert found["pearson"] > 0.5 and found["spearman"] > 0.5
    assert found["labelled_responses"] == 96
    assert 0.5 < found["same_versus_different_attainable"] < 0.95
    assert found["same_versus_different_accuracy"] > 0.5
    assert "same_versus_different_accuracy" not in measure(learner, asked, ["careful"])
