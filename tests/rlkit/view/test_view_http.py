"""The server over real HTTP: every question, lists against the file itself, and who gets no answer."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from view_fixture import serving

from rlkit.view.guard import page_policy
from rlkit.view.query import QUESTIONS, address, ask
from rlkit.view.runs import Runs

RUN = {"run": "main"}
ASKED: dict[str, dict[str, Any]] = {
    "/api/runs": {},
    "/api/metrics": {**RUN, "names": "reward/mean,accuracy/heldout"},
    "/api/samples": {**RUN, "sort": "reward", "order": "desc"},
    "/api/histogram": {**RUN, "key": "component:judge"},
    "/api/scatter": {**RUN, "x": "length", "y": "reward"},
    "/api/distribution": {**RUN, "key": "entropy"},
    "/api/sample": {**RUN, "id": 5},
    "/api/tokens": {**RUN, "id": 5},
    "/api/group": {**RUN, "step": 1, "group": "s000001-g000000"},
    "/api/config": {"runs": "main,older"},
    "/api/compare": {"runs": "first,last"},
    "/api/results": {"run": "first"},
    "/api/log": {**RUN, "path": "logs/console.log"},
}


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        runs = Runs([folder])
        for run in runs.all():
            run.index.follow()
        with serving(runs) as client:
            yield client


def get(client: httpx.Client, path: str, **parameters: Any) -> Any:
    reply = client.get(path, params=parameters)
    assert reply.status_code == 200, reply.text
    return reply.json()


def rows_of(folder: Path, run: str = "main") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", QUESTIONS)
def test_every_question_has_its_answer(client: httpx.Client, path: str) -> None:
    reply = client.get(path, params=ASKED.get(path, RUN))
    assert reply.status_code == 200, reply.text
    QUESTIONS[path].result.model_validate_json(reply.text)


def test_runs_say_what_they_are(client: httpx.Client) -> None:
    runs = {run["id"]: run for run in get(client, "/api/runs")["runs"]}
    assert set(runs) == {"main", "older", "first", "last"}
    assert (runs["main"]["kind"], runs["first"]["kind"]) == ("training", "evaluation")
    assert (runs["main"]["state"], runs["main"]["total_steps"], runs["main"]["samples"]) == ("ended", 8, 1024)
    has = runs["main"]["has"]
    assert has["tokens"] and has["correct"] and has["staleness"] and has["rescored"] == ["strict"]
    assert not runs["older"]["has"]["tokens"]


@pytest.mark.parametrize(
    ("sort", "order"),
    [("reward", "desc"), ("reward", "asc"), ("component:judge", "desc"), ("advantage", "asc")],
)
def test_pages_of_a_sorted_list(client: httpx.Client, folder: Path, sort: str, order: str) -> None:
    """Every row once, in the order of a plain sort of the file; unknown numbers last."""
    rows = rows_of(folder)

    def key(i: int) -> tuple[bool, float]:
        value = rows[i]["components"].get("judge") if ":" in sort else rows[i][sort]
        return value is None, 0.0 if value is None else (-value if order == "desc" else value)

    found: list[int] = []
    cursor = None
    while True:
        page = get(client, "/api/samples", run="main", sort=sort, order=order, limit=300, cursor=cursor or "")
        found += [row["id"] for row in page["rows"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert page["total"] == len(rows)
    assert found == sorted(range(len(rows)), key=lambda i: (*key(i), i))


def test_filters_search_and_restrictions(client: httpx.Client, folder: Path) -> None:
    rows = rows_of(folder)

    def ids(**asked: Any) -> list[int]:
        return [row["id"] for row in get(client, "/api/samples", run="main", limit=1000, **asked)["rows"]]

    def brute(test: Any) -> list[int]:
        return [i for i, row in enumerate(rows) if test(row)][:1000]

    assert ids(filter="reward > 1 and correct = 0") == brute(lambda r: (r["reward"] or 0) > 1 and r["correct"] == 0)
    assert ids(filter="rescored.strict = 1 and dropped is null") == brute(
        lambda r: r["correct"] == 1 and r["dropped"] is None
    )
    assert ids(q="absolutely") == brute(lambda r: "absolutely" in r["response"])
    assert ids(q='"nothing is left"', from_step=3, to_step=4) == brute(
        lambda r: "Nothing is left" in r["response"] and 3 <= r["step"] <= 4
    )
    assert ids(q="absol*") == ids(q="absolutely")
    assert ids(q='"left nothing"') == []
    assert ids(prompt_id="p0003", step=1) == brute(lambda r: r["prompt_id"] == "p0003" and r["step"] == 1)
    assert ids(group=rows[100]["group_id"]) == brute(lambda r: r["group_id"] == rows[100]["group_id"])
    assert set(ids(filter="tokens")) <= set(brute(lambda r: True))


def test_histograms_and_distributions_count_every_sample(client: httpx.Client, folder: Path) -> None:
    rewards = [row["reward"] for row in rows_of(folder)]
    known = [reward for reward in rewards if reward is not None]
    found = get(client, "/api/histogram", run="main", key="reward", bins=7)
    assert found["counts"] == np.histogram(known, 7)[0].tolist()
    assert found["edges"] == pytest.approx(np.histogram(known, 7)[1])
    assert found["missing"] == len(rewards) - len(known)
    whole = get(client, "/api/histogram", run="main", key="staleness")
    assert (whole["edges"], sum(whole["counts"])) == ([-0.5, 0.5, 1.5], len(rewards))
    over = get(client, "/api/distribution", run="main", key="reward", bins=7)
    assert np.sum(over["counts"], axis=0).tolist() == found["counts"]
    assert over["steps"] == list(range(1, 9))


def test_a_sample_its_group_and_its_tokens(client: httpx.Client, folder: Path) -> None:
    raw = rows_of(folder)[5]
    found = get(client, "/api/sample", run="main", id=5)
    assert found["row"] == raw | {"id": 5}
    assert [member["reward"] for member in found["group"]] == raw["group_rewards"]
    assert (found["previous"], found["next"]) == (4, 6)
    assert get(client, "/api/sample", run="main", id=8)["previous"] == 7  # across groups
    assert sum(part["contribution"] or 0 for part in found["account"]) == pytest.approx(raw["reward"], abs=1e-3)
    tokens = get(client, "/api/tokens", run="main", id=5, signals="entropy,mismatch", **{"from": 2, "to": 5})
    assert "".join(get(client, "/api/tokens", run="main", id=5)["pieces"]) == raw["response"]
    assert (tokens["from"], tokens["to"], len(tokens["pieces"]), len(tokens["signals"]["mismatch"])) == (2, 5, 3, 3)
    assert tokens["ranges"]["mismatch"]["signed"] and not tokens["ranges"]["entropy"]["signed"]
    long = next(row["id"] for row in get(client, "/api/samples", run="main", filter="length > 8000")["rows"])
    window = get(client, "/api/tokens", run="main", id=long, **{"from": 4096})
    assert (window["total"], window["to"], len(window["pieces"])) == (8200, 8192, 4096)
    group = get(client, "/api/group", run="main", step=raw["step"], group=raw["group_id"])
    assert [row["sample"] for row in group["rows"]] == list(range(8))
    assert group["rewards"] == raw["group_rewards"]


def test_an_older_run_has_less(client: httpx.Client, folder: Path) -> None:
    raw = rows_of(folder, "older")[0]
    found = get(client, "/api/sample", run="older", id=0)
    assert found["summary"]["length"] == len(raw["token_ids"])
    assert found["summary"]["correct"] is None and found["tokens"] is None
    assert len(found["group"]) == 2
    overview = get(client, "/api/overview", run="older")
    assert overview["warnings"] == [{"text": "3 rows have no answer", "count": 10}]


def test_comparisons_name_no_winner_in_noise(client: httpx.Client) -> None:
    found = get(client, "/api/compare", runs="first,last")
    metric = next(metric for metric in found["metrics"] if metric["name"] == "accuracy/heldout")
    assert metric["paired"] == 64
    assert metric["low"] > 0.2
    assert "last is above first over common prompts, which is better" in metric["words"]
    same = get(client, "/api/compare", runs="first,first")["metrics"][0]
    assert "no winner" in same["words"]
    assert len(found["prompts"]) == 50
    more = get(client, "/api/compare", runs="first,last", cursor=found["next"])["prompts"]
    assert len(more) == 14
    differing = [key["key"] for key in get(client, "/api/config", runs="main,older")["keys"] if key["differs"]]
    assert differing == ["run_dir", "trainer.total_steps"]


def test_one_evaluation_each_is_judged_by_its_own_intervals(tmp_path: Path) -> None:
    values = {"one": (0.2, 0.5), "two": (0.6, 0.7), "three": (0.25, 0.5)}
    for name, (accuracy, reward) in values.items():
        (tmp_path / name).mkdir()
        line = {"kind": "evaluation", "step": 5, "accuracy/heldout": accuracy, "reward/heldout": reward}
        for metric in ("accuracy/heldout", "reward/heldout"):
            line |= {f"{metric}/low": line[metric] - 0.05, f"{metric}/high": line[metric] + 0.05}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / name / "config.yaml").write_text(f"verifier:\n  kind: {'judge' if name == 'two' else 'rule'}\n")
    with serving(Runs([tmp_path])) as client:

        def words(runs: str) -> dict[str, str]:
            return {metric["name"]: metric["words"] for metric in get(client, "/api/compare", runs=runs)["metrics"]}

        apart, alike = words("one,two"), words("one,three")
    above = "last − last, two is above one"
    assert apart["accuracy/heldout"].startswith(f"{above}, which is better: the intervals")
    assert apart["reward/heldout"].startswith(f"{above}, but their rewards differ: the intervals")
    assert alike["accuracy/heldout"] == "last − last, no winner: the intervals of the last evaluations overlap"
    assert list(alike) == ["accuracy/heldout", "reward/heldout"], "bounds are no metrics"


def test_answers_to_further_sets_are_not_those_to_the_questions_themselves(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "last", tmp_path / "last")
    with (tmp_path / "last/samples.jsonl").open("a") as file:
        file.writelines(json.dumps(row | {"set": "hard", "correct": 0.0}) + "\n" for row in rows_of(folder, "last"))
    runs = Runs([folder / "last", tmp_path])
    for run in runs.all():
        run.index.follow()
    with serving(runs) as client:
        (metric,) = get(client, "/api/compare", runs=",".join(run.id for run in runs.all()))["metrics"]
    assert (metric["name"], metric["paired"], metric["difference"]) == ("accuracy/heldout", 64, 0.0)


@pytest.mark.parametrize(
    ("path", "asked", "status", "words"),
    [
        ("/api/samples", {"run": "none"}, 404, "no run 'none'; there are first, last, main, older"),
        ("/api/samples", {}, 400, "run: this parameter is missing"),
        ("/api/samples", {"run": "main", "foo": "1"}, 400, "foo: no such parameter; there are run, step"),
        ("/api/samples", {"run": "main", "limit": "9999"}, 400, "limit=9999: "),
        ("/api/samples", {"run": "main", "step": "x"}, 400, "step=x: "),
        ("/api/samples", {"run": "main", "step": str(2**70)}, 400, "step="),
        ("/api/samples", {"run": "main", "filter": "reward >"}, 400, "filter, character 9: expected a number"),
        ("/api/samples", {"run": "main", "sort": "rank"}, 400, "rank is text, not a number"),
        ("/api/samples", {"run": "main", "sort": "reward; DROP TABLE rows"}, 400, "unknown field"),
        ("/api/samples", {"run": "main", "cursor": "bogus"}, 400, "not a cursor that this list returned"),
        ("/api/samples", {"run": "main", "q": '"*'}, 400, "full-text search needs words"),
        ("/api/sample", {"run": "main", "id": "99999"}, 404, "no sample 99999"),
        ("/api/tokens", {"run": "older", "id": "0"}, 404, "tracking.token_groups_per_step"),
        ("/api/group", {"run": "main", "step": "1", "group": "x"}, 404, "no group 'x'"),
        ("/api/log", {"run": "main", "path": "../main/config.yaml"}, 404, "not a file that /api/files lists"),
        ("/api/log", {"run": "main", "path": "/etc/passwd"}, 404, "not a file that /api/files lists"),
        ("/api/results", {"run": "main"}, 404, "no results.json"),
        ("/api/compare", {"runs": "main"}, 400, "at least two runs"),
        ("/etc/passwd", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered(client: httpx.Client, path: str, asked: Any, status: int, words: str) -> None:
    reply = client.get(path, params=asked)
    assert reply.status_code == status
    assert words in reply.json()["error"]


def test_empty_parameters_count_as_absent(client: httpx.Client) -> None:
    plain = get(client, "/api/samples", run="main")
    assert get(client, "/api/samples", run="main", step="", filter="", q="", cursor="", sort="") == plain
    assert address("/api/samples", {"run": "a b", "step": None, "q": ""}) == "/api/samples?run=a+b"


def test_the_schema_describes_every_question(client: httpx.Client) -> None:
    schema = get(client, "/api/schema")
    for path, question in QUESTIONS.items():
        described = schema["paths"][path]["get"]
        names = {parameter["name"] for parameter in described["parameters"]}
        assert names == {field.alias or name for name, field in question.asked.model_fields.items()}
        assert set(described["responses"]) >= {"200", "400", "404"}


def test_the_page_runs_only_its_own_scripts(client: httpx.Client) -> None:
    reply = client.get("/")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "*" not in policy
    digest = base64.b64encode(hashlib.sha256(b"a<b\n").digest()).decode()
    own = page_policy('<script type="application/json">{}</script><script>a<b\r\n</script><style>p{}</style>')
    assert f"script-src 'sha256-{digest}'; " in own
    assert client.get("/api/runs").headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert client.get("/api/runs").headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1234"}, 200),  # a tunnel from another port
        ({"host": "[::1]:1"}, 200),
        ({"host": "evil.example"}, 403),  # a name that was made to point here
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),  # another server of this machine
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_other_pages_get_no_answer(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    assert client.get("/api/runs", headers=headers).status_code == status


def test_own_origin_and_links_from_elsewhere(client: httpx.Client) -> None:
    origin = str(client.base_url).rstrip("/")
    assert client.get("/api/runs", headers={"origin": origin}).status_code == 200
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=followed).status_code == 200
    assert client.get("/api/runs", headers=followed).status_code == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_written(client: httpx.Client, method: str) -> None:
    for path in ("/", "/api/runs", "/elsewhere"):
        assert client.request(method, path).status_code == 405


def test_a_token_opens_the_page_and_a_cookie_keeps_it_open(folder: Path) -> None:
    token = "a-token-of-24-characters"
    with serving(Runs([folder / "first"]), host="viewer.example", token=token) as client:
        for path in ("/", "/api/runs", "/unknown"):
            reply = client.get(path)
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/api/runs", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/api/runs", headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert client.get("/api/runs", headers={"host": "evil.example"}, params={"token": token}).status_code == 403
        assert client.get("/api/runs", params={"token": token}, headers={"host": "viewer.example"}).status_code == 200
        opened = client.get("/", params={"token": token})
        cookie = opened.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert token not in opened.text and "url=/" in opened.text
        assert client.get("/api/runs").status_code == client.get("/").status_code == 200


def test_on_all_addresses_it_goes_by_any_number(folder: Path) -> None:
    """A name may have been made to point here; a number points where it says."""
    token = "a-token-of-24-characters"
    with serving(Runs([folder / "first"]), host="0.0.0.0", token=token) as client:
        hosts = {"192.168.1.5:7007": 200, "[fd00::5]:7007": 200, socket.gethostname(): 200, "evil.example": 403}
        for host, status in hosts.items():
            reply = client.get("/api/runs", params={"token": token}, headers={"host": host})
            assert reply.status_code == status, host
        assert reply.json()["error"].endswith("or its IP address")
    with serving(Runs([folder / "first"]), host="viewer.example", token=token) as client:
        assert client.get("/api/runs", headers={"host": "192.168.1.5"}, params={"token": token}).status_code == 403


def test_a_comma_in_the_name_of_a_folder_parts_no_runs(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "older", tmp_path / "lr=0.1,seed=2")
    with serving(Runs([tmp_path])) as client:
        (run,) = get(client, "/api/runs")["runs"]
        assert (run["id"], run["path"]) == ("lr=0.1;seed=2", str(tmp_path / "lr=0.1,seed=2"))
        assert get(client, "/api/config", runs=run["id"])


def test_rewards_that_come_later_are_an_event(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "main", tmp_path / "run")
    (run,) = Runs([tmp_path]).all()
    before = run.stamp()
    with (run.path / "rescored/strict.jsonl").open("a") as file:
        file.write("{}\n")
    assert run.stamp() != before


def test_answers_of_an_evaluation_are_distributed(client: httpx.Client, folder: Path) -> None:
    found = get(client, "/api/distribution", run="first", key="reward")
    assert sum(map(sum, found["counts"])) == sum(row["reward"] is not None for row in rows_of(folder, "first"))


def test_an_error_points_into_what_was_typed(client: httpx.Client) -> None:
    """Not into the interval that was chosen in a histogram; brackets of the one do not close those of the other."""
    asked = {**RUN, "filter": "rewad > 1", "within": "length >= 50 and length < 90"}
    assert client.get("/api/samples", params=asked).json()["error"].startswith("filter, character 1:")
    assert client.get("/api/samples", params={**asked, "filter": "reward > 1) or (reward > 0"}).status_code == 400
    within = get(client, "/api/samples", **{**asked, "filter": "reward < 2 or reward >= 2", "limit": 1000})["rows"]
    assert within and all(50 <= row["length"] < 90 for row in within)


def test_events_tell_of_growth_and_of_a_cut(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "live"
    shutil.copytree(folder / "older", run)
    file = run / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    with serving(Runs([run])) as client, client.stream("GET", "/api/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        incoming = events.iter_lines()

        def next_event() -> dict[str, Any]:
            return next(json.loads(line[6:]) for line in incoming if line.startswith("data: "))

        time.sleep(0.1)
        with file.open("ab") as stream:
            stream.write(lines[0] + lines[1][:30])
        assert next_event() == {"run": "live", "step": 4, "state": "ended", "samples": len(lines) + 1}
        file.write_bytes(b"".join(lines[:10]))
        (run / "summary.json").unlink()
        event = next_event()
        assert (event["samples"], event["run"]) == (10, "live")


def test_a_new_run_in_the_folder_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "first", tmp_path / "runs" / "a" / "x")
    with serving(Runs([tmp_path / "runs"])) as client:
        assert [run["id"] for run in get(client, "/api/runs")["runs"]] == ["x"]
        shutil.copytree(folder / "first", tmp_path / "runs" / "b" / "x")
        assert [run["id"] for run in get(client, "/api/runs")["runs"]] == ["x", "x-2"]


def test_columns_of_evaluations_bring_their_bounds(tmp_path: Path) -> None:
    bounds = {"/low": 0.4, "/high": 0.6, "_low": 0.2, "_high": 0.8}
    names = {"accuracy/heldout": ("/low", "/high"), "environment/metric/won": ("_low", "_high")}
    line = {name + end: bounds[end] for name, ends in names.items() for end in ends} | dict.fromkeys(names, 0.5)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "evaluation", "step": 1, "time": 1.0, **line}) + "\n")
    found = ask(Runs([tmp_path]), "/api/metrics", {"run": tmp_path.name, "names": ",".join(names)})
    assert found.model_dump()["evaluation"]["values"] == {
        "accuracy/heldout": [0.5],
        "accuracy/heldout/low": [0.4],
        "accuracy/heldout/high": [0.6],
        "environment/metric/won": [0.5],
        "environment/metric/won/low": [0.2],
        "environment/metric/won/high": [0.8],
    }


def test_a_run_that_is_removed_is_listed_no_more(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(folder / "first", tmp_path / "runs" / name)
    with serving(Runs([tmp_path / "runs"])) as client:
        assert len(get(client, "/api/runs")["runs"]) == 2
        shutil.rmtree(tmp_path / "runs" / "a")
        assert [run["id"] for run in get(client, "/api/runs")["runs"]] == ["b"]
        reply = client.get("/api/overview?run=a")
    assert (reply.status_code, reply.json()["error"]) == (404, "no run 'a'; there are b")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "samples.jsonl").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    with serving(Runs([tmp_path / "run"])) as client:
        reply = client.get("/api/samples?run=run")
        (listed,) = get(client, "/api/runs")["runs"]
    assert "cannot be read" in listed["state_text"]
    assert reply.status_code == 500
    assert "samples.jsonl" in reply.json()["error"]
