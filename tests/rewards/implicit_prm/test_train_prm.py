"""Offline training of the implicit PRM: objectives, invariances, what is saved, and its evaluation."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from prm_fixture import write_chat_model, write_rollouts

from rewards.implicit_prm import evaluation as prm_evaluation
from rewards.implicit_prm.learner import Encoded, PrmLearner, encode, make_examples, prompt_items
from rewards.implicit_prm.training import NOTE, ImplicitPRMTraining
from rlkit.data.rendering import load_tokenizer
from rlkit.reward_training.outcomes import OutcomeData, load_rollouts
from rlkit.reward_training.rows import draw_batches

LN2 = math.log(2)
FIRST = {"ce": LN2, "dpo": LN2, "nca": 2 * LN2, "kto": 0.5}
"""Every objective's value where pi_phi equals pi_ref."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("prm") / "model")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    import torch.distributed as dist

    from rlkit.learner.engine import init_process_group

    if not dist.is_initialized():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        init_process_group(0, 1, "127.0.0.1", port, "cpu")


def rollouts(model: Path, folder: Path, seed: int = 0, prompts: int = 12) -> list[Encoded]:
    file = write_rollouts(folder / f"rollouts{seed}.jsonl", seed=seed, prompts=prompts)
    found, _ = load_rollouts(OutcomeData(path=str(file)))
    encoded, bad = encode(found, load_tokenizer(model), None, "auto")
    assert bad == []
    return encoded


def learner(model: Path, objective: str = "ce", **options: object) -> PrmLearner:
    config = ImplicitPRMTraining.Config(
        objective=objective, **{"learning_rate": 1e-3, "schedule": "constant", **options}
    )  # type: ignore[arg-type]
    return PrmLearner(
        model, model, config.learner(20, "cpu"), objective=config.objective, beta=1.0, device="cpu", total_steps=20
    )


def test_rollouts_in_tokens(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    one = rollouts(model, tmp_path)[0]
    assert tokenizer.decode(one.prompt) == "<bos> w3 w4 <bos>"
    assert tokenizer.decode(one.response) == one.rollout.response.replace("\n", " ") + " <eos>"
    assert one.steps == ((0, 4), (4, 9)), "four words, and four with the end of the sequence"
    found, _ = load_rollouts(OutcomeData(path=str(tmp_path / "rollouts0.jsonl")))
    assert (
        "has 13 tokens, more than the model's or reward.max_tokens=12"
        in encode(found, tokenizer, 12, "auto")[1][0].reason
    )


@pytest.mark.parametrize("objective", ["ce", "dpo", "nca", "kto"])
def test_every_objective_starts_at_its_value_and_learns_to_order_unseen_responses(
    model: Path, tmp_path: Path, objective: str
) -> None:
    train, unseen = rollouts(model, tmp_path), rollouts(model, tmp_path, seed=1)
    examples = make_examples(train, objective in ("dpo", "nca"), "none", 0)
    trained = learner(model, objective)
    batches = draw_batches([[example] for example in examples], 16, seed=0, across_epochs=False)
    losses = [trained.step(train, next(batches)) for _ in range(12)]
    assert losses[0] == pytest.approx(FIRST[objective], abs=1e-5)
    assert losses[-1] < losses[0]
    metrics = prm_evaluation.outcome_metrics(unseen, trained.scorer.log_ratios(unseen), beta=1.0)
    assert metrics["pair_accuracy"] > 0.8


def test_scores_are_those_of_the_plain_models(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    encoded = rollouts(model, tmp_path, prompts=3)
    trained = learner(model, tokens_per_microbatch=30)
    trained.step(encoded, make_examples(encoded, False, "none", 0))
    trained.save(tmp_path / "saved")
    phi, ref = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "saved", model))
    for one, q in zip(encoded, trained.scorer.log_ratios(encoded), strict=True):
        ids = torch.tensor([[*one.prompt, *one.response]])
        start = len(one.prompt) - 1
        logprobs = [m(ids).logits[0, start:-1].log_softmax(-1).detach() for m in (phi, ref)]
        expected = (logprobs[0] - logprobs[1])[range(len(one.response)), list(one.response)]
        np.testing.assert_allclose(q, expected, atol=1e-4)
        assert np.abs(q).max() > 1e-3


@pytest.mark.parametrize("objective", ["ce", "dpo", "kto"])
def test_micro_batches_do_not_change_loss_or_step(model: Path, tmp_path: Path, objective: str) -> None:
    encoded = rollouts(model, tmp_path)
    batch = make_examples(encoded, objective == "dpo", "none", 0)[:22]
    seen = []
    for tokens in (50, 16384):
        trained = learner(model, objective, tokens_per_microbatch=tokens)
        trained.step(encoded, batch)  # after it pi_phi differs from pi_ref, and KTO's baseline is no longer 0
        seen.append((trained.step(encoded, batch), float(trained._baseline), trained.scorer.log_ratios(encoded)))
    assert seen[0][0] == pytest.approx(seen[1][0], abs=1e-5)
    assert seen[0][1] == pytest.approx(seen[1][1], abs=1e-5)
    # AdamW's first steps are lr * sign(gradient) nearly everywhere; a gradient near zero may differ by rounding.
    np.testing.assert_allclose(np.concatenate(seen[0][2]), np.concatenate(seen[1][2]), atol=5e-3)


def test_the_baseline_of_kto_is_the_mean_score_of_responses_to_other_prompts(model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    encoded = [replace(e, rollout=replace(e.rollout, label=1.0)) for e in rollouts(model, tmp_path, prompts=4)]
    batch = make_examples(encoded, False, "none", 0)
    baselines = []
    for tokens in (30, 16384):
        trained = learner(model, "kto", tokens_per_microbatch=tokens)
        for _ in range(4):
            trained.step(encoded, batch)  # all are right: pi_phi learns to like such texts after any prompt
        trained.evaluate(encoded, batch)
        first = encoded[::4]
        others = [replace(e, prompt=other.prompt) for e, other in zip(first, [*first[1:], first[0]], strict=True)]
        expected = np.mean([q.sum() for q in trained.scorer.log_ratios(others)])
        baselines.append(float(trained._baseline))
        assert baselines[-1] == pytest.approx(expected, abs=1e-4)
    assert baselines[0] > 0.1
    assert baselines[0] == pytest.approx(baselines[1], rel=0.02)


def test_soft_labels_pull_towards_their_share(model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    encoded = [replace(e, rollout=replace(e.rollout, label=0.75)) for e in rollouts(model, tmp_path, prompts=4)]
    trained = learner(model)
    for _ in range(20):
        loss = trained.step(encoded, make_examples(encoded, False, "none", 0))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy - 1e-6 < loss < LN2


def test_batches_visit_every_example_once_per_epoch() -> None:
    examples = [(i,) for i in range(10)]
    batches = draw_batches([[example] for example in examples], 4, seed=1, across_epochs=False)
    epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert all(sorted(e for batch in epoch for e in batch) == examples for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_pairs_and_balance(model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    encoded = rollouts(model, tmp_path, prompts=3)
    labels = [1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0.5]
    encoded = [
        replace(e, rollout=replace(e.rollout, label=float(label))) for e, label in zip(encoded, labels, strict=True)
    ]
    pairs = make_examples(encoded, True, "none", 0)
    assert pairs == [(0, 1), (2, 1), (3, 1), (8, 9), (8, 10), (8, 11), (11, 9), (11, 10)]
    balanced = [i for (i,) in make_examples(encoded, False, "prompt", 0)]
    assert len(balanced) == 4 and {1, 8} < set(balanced)
    assert not set(balanced) & {4, 5, 6, 7}, "a prompt whose responses are all wrong teaches nothing here"
    items = prompt_items(encoded, pairs[:4], 16384)
    assert [len(item.labels) for item in items] == [4, 2]
    assert items[0].pairs == ((0, 1), (2, 1), (3, 1))
    limit = max(len(item.tree.prefix) + 2 * max(map(len, item.tree.suffixes)) for item in items)
    cut = prompt_items(encoded, pairs, limit)
    assert len(cut) > len(prompt_items(encoded, pairs, 16384))
    assert all(item.tree.tokens <= limit for item in cut)
    compared = [(item.tree.suffixes[a], item.tree.suffixes[b]) for item in cut for a, b in item.pairs]
    assert compared == [(encoded[a].response, encoded[b].response) for a, b in pairs]


def test_choices_among_responses(model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    base = rollouts(model, tmp_path, prompts=1)
    texts = ["x\nA: 7", "x\nA: 5", "x\nA: 7", "no number"]
    encoded = [
        replace(e, rollout=replace(e.rollout, response=t, label=float(t.endswith("7"))), steps=((0, 2), (2, 3)))
        for e, t in zip(base, texts, strict=True)
    ]
    ratios = [np.array(q) for q in ([0.1, 0.1, -0.9], [0.3, 0.3, 0.3], [0.5, 0.5, 0.1], [2.0, 2.0, -5.0])]
    table = prm_evaluation.selection_accuracy(encoded, ratios, coefficient=1.0, seed=0)
    assert list(table) == [1, 2, 4]
    assert table[1]["random"] == table[4]["random"] == table[1]["best by worst step"] == 0.5
    assert table[4]["oracle"] == 1.0 and table[4]["majority"] == 1.0
    assert table[4]["best by worst step"] == 0.0, "0.3 is the largest minimum, and that answer is 5"
    assert table[4]["best by response score"] == 1.0
    assert table[2]["oracle"] == pytest.approx(5 / 6)
    assert "N=4" in prm_evaluation.selection_table(table)


def test_training_and_evaluation_as_a_user_runs_them(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from rlkit import train_reward

    data = write_rollouts(tmp_path / "rollouts.jsonl", prompts=24)
    run = tmp_path / "run"
    options = [f"data.path={data}", f"reward.model_path={model}", "threads=1", "reward.beta=1", "reward.batch_size=16"]
    more = [f"run_dir={run}", "reward.learning_rate=1e-3", "reward.epochs=2", "reward.evaluate_every_steps=4"]
    assert train_reward.main([*options, *more]) == 0
    printed = capfd.readouterr().out
    assert "step  1/12" in printed and "N=4" in printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["loss_first"] == pytest.approx(LN2, abs=1e-5)
    assert summary["before"]["prm/heldout_cross_entropy"] == pytest.approx(LN2, abs=1e-6)
    assert summary["after"]["prm/heldout_cross_entropy"] < LN2
    assert summary["after"]["prm/heldout_pair_accuracy"] > 0.8
    assert summary["choices"]["4"]["best by response score"] > summary["choices"]["4"]["random"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [0, 4, 8, 12]
    assert sum(line["kind"] == "step" for line in lines) == 12
    assert len((run / "samples.jsonl").read_text().splitlines()) == 8
    assert json.loads((run / "model" / NOTE).read_text())["reference_path"] == str(model)

    judged = [
        options[0],
        options[2],
        options[3],
        f"reward.model_path={run / 'model'}",
        f"run_dir={tmp_path / 'judged'}",
    ]
    assert train_reward.main(["stage=evaluate", *judged]) == 0
    result = json.loads((tmp_path / "judged" / "summary.json").read_text())
    assert result["responses"] == 96 and result["reference"] == str(model)
    assert result["metrics"]["prm/pair_accuracy"] > 0.8

    unknown = [f"reward.model_path={model}", f"run_dir={tmp_path / 'refused'}", options[0], "stage=evaluate"]
    assert train_reward.main(unknown) == 1
    assert "name the model it was trained against" in capfd.readouterr().err


def test_first_wrong_steps_are_evaluated_where_they_are_known(model: Path, tmp_path: Path) -> None:
    from rlkit import train_reward

    rows = [
        {"problem": "w3", "steps": ["w5 w6", "w50"], "label": 1},
        {"problem": "w4", "steps": ["w5 w6"], "label": -1},
    ]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"data.path={file}", f"reward.model_path={model}", f"reward.reference_path={model}", "stage=evaluate"]
    assert train_reward.main([*options, "reward.threshold=0.4", f"run_dir={tmp_path / 'run'}"]) == 0
    result = json.loads((tmp_path / "run" / "summary.json").read_text())["process_bench"]
    assert result == {
        "f1": 0.0,
        "error_accuracy": 0.0,
        "correct_accuracy": 1.0,
        "threshold": 0.4,
        "threshold_tuned_here": False,
    }, "equal models find nothing wrong"
