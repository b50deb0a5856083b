"""The tiny models in the package, what they learn from, and remaking them."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from examples.embedded_models import remake as remake_embedded
from examples.embedded_models.corpora import careless_solution
from examples.embedded_models.pairs import (
    RIGHT,
    WRONG,
    final_answers,
    is_right,
    labelled_triplets,
    last_line,
    phrasing,
    right_answer,
    wrong_answer,
)
from examples.embedded_models.scale import POOL, Variant
from rewards.polar.learner import final
from rewards.polar.serialise import Limits
from rewards.polar.triplets import (
    PolarRows,
    Triplet,
    attainable_accuracy,
    expected_accuracy,
    policy_triplets,
    read,
    write_triplets,
)
from rlkit.data.arithmetic import STYLES, ArithmeticConfig, draw_problems, write_solution
from rlkit.data.base import DataError
from rlkit.models.folder import EMBEDDED, model_folder

LIMITS = Limits(max_length=1024, max_response_length=256)
LARGEST_FILE = 4 * 2**20
PROBLEMS = draw_problems(ArithmeticConfig(heldout_problems=128), "heldout")
REPORT = json.loads((EMBEDDED / "report.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    from rlkit.data.rendering import load_tokenizer

    return load_tokenizer(model_folder("embedded:policy"))


# -- names ---------------------------------------------------------------------------------------------------------


def test_names_lead_to_folders_and_unknown_ones_are_listed() -> None:
    assert model_folder("embedded:policy") == EMBEDDED / "policy"
    assert model_folder("some/where") == Path("some/where").absolute()
    with pytest.raises(ValueError, match="embedded:polar, embedded:policy"):
        model_folder("embedded:polcy")


# -- the tokenizer -------------------------------------------------------------------------------------------------


def test_any_text_survives_and_every_digit_is_alone(tokenizer) -> None:
    text = "Héllo  wörld\n\n\t 12345 3.14 漢字 🙂 #### 42 <<3*4=12>>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(token) == 1 for token in tokens if any(character.isdigit() for character in token))


def test_words_of_the_task_are_single_tokens_and_prompts_are_short(tokenizer) -> None:
    assert 400 <= len(tokenizer) <= 640
    lengths = [len(tokenizer.encode(problem.question)) for problem in PROBLEMS]
    assert sum(lengths) / len(lengths) < 35
    for word in (" apples", " dollars", " times", "####", "<<", ">>"):
        assert len(tokenizer.encode(word)) == 1, word


def test_special_tokens_are_single_and_nothing_is_added(tokenizer) -> None:
    for token in ("<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|reward|>", "[UNUSED_TOKEN_130]"):
        assert len(tokenizer.encode(token)) == 1
    assert tokenizer.decode(tokenizer.encode("a")) == "a"


def test_chat_template_continues_where_generation_begins(tokenizer) -> None:
    asked = [{"role": "user", "content": "1+1?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "2"}], tokenize=False)
    assert prompt == "<|user|>1+1?<|assistant|>" and whole == prompt + "2<eos>"
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


# -- corpora -------------------------------------------------------------------------------------------------------


def test_careless_solutions_go_wrong_as_often_as_asked() -> None:
    rng = random.Random(0)
    one_step = [problem for problem in PROBLEMS if len(problem.steps) == 1]
    for rate in (0.0, 0.3):
        right = [is_right(careless_solution(p, "words", rate, rng), p.answer) for p in one_step for _ in range(40)]
        assert sum(right) / len(right) == pytest.approx(1 - rate, abs=0.04)


@pytest.mark.parametrize("right", [True, False])
def test_every_kind_of_candidate_is_labelled_by_the_rule(right: bool) -> None:
    rng = random.Random(1)
    for problem in PROBLEMS[:40]:
        for style in STYLES:
            text = right_answer(problem, style, rng) if right else wrong_answer(problem, style, rng)
            assert is_right(text, problem.answer) == right, text
    for kinds in (RIGHT, WRONG):
        assert sum(weight for _, weight in kinds) == pytest.approx(1)


def test_pool_triplets_share_their_phrasing_and_differ_in_quality() -> None:
    assert len([variant for variant in POOL if not variant.heldout]) >= 12
    assert len([variant for variant in POOL if variant.heldout]) >= 3
    careful, careless = Variant("words", 0.0), Variant("words", 1.0)
    other = Variant("equations", 0.0)
    rng = random.Random(0)
    pool = {
        variant: [[careless_solution(p, variant.style, variant.slip_rate, rng) for _ in range(2)] for p in PROBLEMS]
        for variant in (careful, careless, other)
    }
    groups = policy_triplets([problem.question for problem in PROBLEMS], pool, phrasing)
    triplets = [triplet for group in groups for triplet in group]
    assert {(group[0].prompt, group[0].reference) for group in groups} == {(t.prompt, t.reference) for t in triplets}
    assert {" is " in triplet.reference and " is " in triplet.rejected for triplet in triplets} == {True}
    # The careful policy agrees with itself always (1), the careless one by chance only (about 1/2).
    assert 0.7 < attainable_accuracy(triplets, final) < 0.9
    assert expected_accuracy({careful: 0.0, careless: 1.0}, phrasing) == 0.5 + 0.5 * 0.5 * (1 - 0)


def test_labelled_triplets_cross_phrasings_when_asked() -> None:
    answers = {problem.question: problem.answer for problem in PROBLEMS}
    copies = {}
    for crossed in (False, True):
        groups = islice(labelled_triplets(PROBLEMS, [[] for _ in PROBLEMS], 0, crossed), 100)
        triplets = [triplet for group in groups for triplet in group]
        for triplet in triplets:
            assert is_right(triplet.reference, answers[triplet.prompt])
            assert is_right(triplet.chosen, answers[triplet.prompt])
            assert not is_right(triplet.rejected, answers[triplet.prompt])
        copies[crossed] = sum(triplet.chosen == triplet.reference for triplet in triplets) / len(triplets)
    assert copies[False] > 0.6 and copies[True] < 0.1


def test_sampled_answers_are_taken_where_there_are_any() -> None:
    problem = PROBLEMS[0]
    sampled = [f"my way: #### {problem.answer}", "my way: #### 99"]
    triplets = next(labelled_triplets([problem], [sampled], 0))
    assert any(triplet.chosen == sampled[0] for triplet in triplets)
    assert any(triplet.rejected == sampled[1] for triplet in triplets)


def test_last_lines_alone_leave_only_numbers_to_compare() -> None:
    for group in islice(final_answers(PROBLEMS, 0), 50):
        assert len(group) == 4 and len({triplet.rejected for triplet in group}) == 4
        for triplet in group:
            assert triplet.reference.endswith(triplet.chosen) and triplet.chosen != triplet.rejected
    assert last_line("a\n#### 3") == "#### 3" == last_line("#### 3")


def test_triplets_survive_the_official_json_form(tmp_path: Path) -> None:
    file = tmp_path / "triplets.jsonl"
    triplets = [Triplet("1+1?", "2", "two\n#### 2", "3"), Triplet("é", "", "a", "b")]
    write_triplets(triplets, file)
    rows = PolarRows(path=str(file), max_bad_row_share=0)
    assert [triplet for prompt in read(rows, "triplets")[0] for triplet in prompt.triplets] == triplets
    first = '{"prompt": "p", "reference": "r", "chosen": "c", "rejected": "x"}\n'
    file.write_text(first)
    assert read(rows, "triplets")[0][0].triplets == [Triplet("p", "r", "c", "x")]
    file.write_text(first + '{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"triplets.jsonl:2.*reference"):
        read(rows, "triplets")


# -- what is shipped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["policy", "polar"])
def test_shipped_files_are_small_and_are_the_reports(name: str) -> None:
    weights = EMBEDDED / name / "model.safetensors"
    assert weights.stat().st_size <= LARGEST_FILE
    assert REPORT[name]["parameters"] <= 2_000_000
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == REPORT[name]["sha256"]
    config = json.loads((EMBEDDED / name / "config.json").read_text())
    assert config["model_type"] == "llama" and config["head_dim"] == 32


@pytest.mark.slow
def test_shipped_policy_has_headroom() -> None:
    from examples.embedded_models.pairs import correctness
    from examples.embedded_models.sampling import PLAIN
    from examples.embedded_models.stages import answers_of

    right = correctness(PROBLEMS, answers_of(EMBEDDED / "policy", PROBLEMS, 8, PLAIN, seed=5))
    assert 0.25 <= right.mean() <= 0.45
    assert right.any(axis=1).mean() >= 0.8
    assert 0.25 <= REPORT["policy"]["accuracy_at_temperature_1"] <= 0.45
    assert REPORT["policy"]["accuracy_greedy"] > REPORT["policy"]["accuracy_at_temperature_1"]


@pytest.mark.slow
def test_shipped_discriminator_knows_right_from_wrong(process_group: None, tmp_path: Path) -> None:
    from examples.embedded_models.polar_stages import measure_discriminator
    from examples.embedded_models.sampling import PLAIN
    from examples.embedded_models.stages import answers_of

    sampled = answers_of(EMBEDDED / "policy", PROBLEMS, 4, PLAIN, seed=6)
    measured = measure_discriminator(EMBEDDED / "polar", PROBLEMS, sampled, seed=9, work=tmp_path)
    for name, accuracy in measured.items():
        if name.startswith("right_versus_wrong"):
            assert accuracy >= 0.9, measured
            assert REPORT["polar"][name] >= 0.9


# -- the discriminator's training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group() -> None:
    import torch.distributed as dist

    from rlkit.cluster.processes import free_port
    from rlkit.learner.engine import init_process_group

    if not dist.is_initialized():
        init_process_group(0, 1, "127.0.0.1", free_port(), "cpu")


def test_untrained_discriminator_starts_at_ln_2_and_learns_from_pairs(
    process_group: None,
) -> None:
    from rewards.polar.learner import PolarLearner
    from rlkit.config.schema import LearnerConfig

    config = LearnerConfig(learning_rate=2e-3, betas=(0.9, 0.95))
    learner = PolarLearner(EMBEDDED / "policy", config, device="cpu", total_steps=30, limits=LIMITS)
    problem = PROBLEMS[0]
    reference = write_solution(problem.steps, problem.thing, "equations")
    triplets = [Triplet(problem.question, reference, reference, f"{number} is no answer") for number in range(8)]
    (comparison,) = learner.comparisons(triplets)  # one prompt, one reference, nine candidates
    assert len(comparison.tree.suffixes) == 9 and len(comparison.pairs) == 8
    assert learner.step(triplets) == pytest.approx(math.log(2), abs=1e-6)
    for _ in range(15):
        learner.step(triplets)
    measured = learner.measure(triplets)
    assert measured.loss < 0.3
    ties = learner.measure([Triplet(problem.question, reference, "same", "same")])
    assert ties.accuracy == 0.0 and ties.loss == pytest.approx(math.log(2))


def test_pair_loss_is_that_of_separate_inputs(process_group: None, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from rewards.polar.learner import PolarLearner
    from rlkit.config.schema import LearnerConfig

    folder = EMBEDDED / "polar"
    learner = PolarLearner(folder, LearnerConfig(), device="cpu", total_steps=1, limits=LIMITS)
    triplet = Triplet("A bus has 3 riders. 2 get off. How many?", "3-2=1\n#### 1", "#### 1", "3+2=5\n#### 5")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    scores = []
    for candidate in (triplet.chosen, triplet.rejected):
        text = f"{triplet.prompt}\n{triplet.reference}<|reward|>{triplet.prompt}\n{candidate}[UNUSED_TOKEN_130]"
        with torch.no_grad():
            scores.append(model(input_ids=torch.tensor([learner.tokenizer.encode(text)])).logits[0, 0])
    expected = -torch.nn.functional.logsigmoid(scores[0] - scores[1])
    assert learner.measure([triplet]).loss == pytest.approx(expected.item(), rel=1e-4)


# -- remaking ------------------------------------------------------------------------------------------------------


def test_kept_stages_are_not_repeated(tmp_path: Path) -> None:
    stages = remake_embedded._Stages(tmp_path)
    calls: list[int] = []
    for _ in range(2):
        assert stages("base", lambda: calls.append(1) or {"loss": 1.5}) == {"loss": 1.5}
    assert calls == [1] and "base" in stages.seconds


@pytest.mark.slow
def test_remaking_makes_models_that_load_and_have_learnt(tmp_path: Path, capsys) -> None:
    assert remake_embedded.main([f"out={tmp_path}", "scale=fast"]) == 0
    capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["base"]["last_loss"] < 0.6 * report["base"]["first_loss"]
    assert report["polar_pretraining"]["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert report["polar_finetuning"]["last_loss"] < report["polar_finetuning"]["first_loss"]
    assert report["polar"]["right_versus_wrong_same_phrasing"] > 0.6
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert policy.num_parameters() == report["policy"]["parameters"]
    assert policy.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token_id
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "polar").config.num_labels == 1
    made, shipped = (json.loads((folder / "polar" / "config.json").read_text()) for folder in (tmp_path, EMBEDDED))
    assert {**made, "vocab_size": shipped["vocab_size"]} == shipped


@pytest.mark.parametrize(
    ("argument", "message"), [("scale=fats", "one of full, fast"), ("--fast", "scale=full"), ("seed=x", "whole number")]
)
def test_arguments_that_mean_nothing_are_refused(argument: str, message: str, capsys) -> None:
    assert remake_embedded.main([argument]) == 2
    assert message in capsys.readouterr().err


def test_variants_have_names_of_their_own() -> None:
    assert len({variant.name for variant in POOL}) == len(POOL)
    assert replace(POOL[0], slip_rate=0.25).name == "equations-0.25"
