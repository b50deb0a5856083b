"""The page in a real browser, over made-up runs and the real server. Each reader ends without a console message and
without a request off this machine (tests/fixtures/page_fixture.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from page_fixture import Reader, reading, serving
from synthetic_run import make_run

from rlkit.view.report import write

SCREENS = ["overview", "curves", "samples", "distributions", "triage", "compare", "time", "config"]
ROWS = "[...document.querySelectorAll('[role=grid] [aria-selected]')]"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "view.png"


def rows(reader: Reader) -> list[str]:
    return [row.inner_text() for row in reader.page.locator("[role=grid] [aria-selected]").all()]


def test_a_run_opens_and_leads_to_a_sample(browser: Any, tmp_path: Path) -> None:
    """The smoke test: the others are slow."""
    make_run(tmp_path / "run", 64)
    with serving(tmp_path / "run", cache=tmp_path / "cache") as link, reading(browser, link) as reader:
        reader.page.goto(link)
        reader.settle()
        reader.page.get_by_role("link", name="Samples").click()
        reader.page.locator("[role=grid] [aria-selected]").first.click()
        reader.shows("Colour by")


@pytest.mark.slow
class TestScreens:
    def test_overview(self, reader: Reader) -> None:
        page = reader.page
        reader.open("overview", run="main")
        light = page.locator("details", has_text="reward and accuracy").first
        light.locator("summary").click()
        for heading in ("What it means", "How to read it", "What to do"):
            assert light.get_by_text(heading).is_visible()
        light.get_by_role("link", name="Its curves").click()
        reader.hash("#/curves")
        page.go_back()
        page.locator("a.tile").first.click()
        reader.hash("match=")
        page.locator("main figure").wait_for()  # one alone
        page.go_back()
        page.locator("a.last").first.click()
        reader.hash("#/sample?")

    def test_curves(self, reader: Reader) -> None:
        page = reader.page
        reader.open("curves", run="main")
        page.get_by_label("Names matching").fill("(")
        reader.shows("This is not a regular expression")
        page.get_by_label("Names matching").fill("no such name")
        reader.shows("No metric name matches")
        page.get_by_label("Names matching").fill("^reward/mean|heldout$")
        chart = page.get_by_role("application", name=re.compile("^reward.mean over step"))
        chart.wait_for()
        page.get_by_label("Smoothing").fill("0.6")
        reader.hash("smooth=0.6")
        page.get_by_role("combobox", name="x axis").select_option("samples")
        page.get_by_role("application", name=re.compile("^reward.mean over samples")).wait_for()
        page.get_by_role("combobox", name="x axis").select_option("step")
        page.locator("summary", has_text="Compare with").click()
        page.get_by_role("checkbox", name="honest").check()
        page.get_by_role(
            "application", name=re.compile("^reward.mean over step.*main: last .*; honest: last")
        ).wait_for()
        page.locator("summary", has_text="Compare with").click()
        summary = page.locator("summary", has_text="accuracy")
        summary.click()
        reader.hash("closed=accuracy")
        chart.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert "step 2" in page.locator("figure output").last.inner_text()
        page.keyboard.press("Enter")
        reader.hash("step=2")
        page.go_back()
        box = chart.bounding_box()
        assert box
        page.mouse.move(box["x"] + box["width"] / 3, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
        page.mouse.up()
        reader.button("whole range").click()
        assert reader.button("whole range").count() == 0
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 60)
        reader.hash("#/samples")
        reader.hash("step=")
        assert "closed" not in page.url

    def test_samples(self, reader: Reader) -> None:
        page = reader.page
        reader.open("samples", run="main")
        reader.page.wait_for_selector("[role=grid] [aria-selected]")
        page.get_by_role("columnheader", name="correct").wait_for()  # at first the server is still reading
        total = page.locator("main [role=status]").first.inner_text()
        page.get_by_role("columnheader", name="reward").get_by_role("button").click()
        reader.hash("sort=reward")
        assert page.get_by_role("columnheader", name="reward").get_attribute("aria-sort") == "descending"
        page.get_by_role("columnheader", name="reward").get_by_role("button").click()
        reader.hash("order=asc")
        page.get_by_role("columnheader", name="reward").get_by_role("button").click()
        reader.until("() => !location.hash.includes('sort=')")

        field = page.get_by_label("Filter")
        reader.expected = "400 (Bad Request)"
        field.fill("reward > 1 and corect = 0")
        field.press("Enter")
        reader.shows("did you mean correct")
        field.fill("reward > 1 and correct = 0")
        field.press("Enter")
        reader.until("text => document.querySelector('main [role=status]').textContent.trim() !== text", total)
        page.wait_for_selector("[role=grid] [aria-selected]")
        assert all("✗ wrong" in row for row in rows(reader))
        field.fill("")
        field.press("Enter")

        page.keyboard.press("Escape")
        page.locator("h1").click()
        page.keyboard.press("/")
        page.keyboard.type('"absolutely certain"')
        page.keyboard.press("Enter")
        reader.hash("q=")
        page.get_by_label("Text").fill("")
        page.get_by_label("Text").press("Enter")
        page.get_by_label("from step").fill("2")
        page.get_by_label("to step").fill("3")
        page.get_by_label("to step").press("Enter")
        reader.hash("to_step=3")
        reader.counts("256 samples")
        reader.until(f"() => {ROWS}.every(row => /^[23]/.test(row.innerText))")
        reader.button("to step 3").click()
        reader.button("from step 2").click()

        bars = page.get_by_role("toolbar", name="reward: bins")
        bars.get_by_role("button").last.click()
        reader.hash("in-reward=")
        bars.get_by_role("button").nth(-4).click(modifiers=["Shift"])
        pressed = "name => document.querySelectorAll(`[aria-label='${name}'] [aria-pressed=true]`).length === 4"
        reader.until(pressed, "reward: bins")
        bars.get_by_role("button").nth(-4).focus()
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "false"
        page.get_by_role("button", name=re.compile("remove this condition")).click()
        reader.until("() => !location.hash.includes('in-reward')")

    def test_keys_of_the_list(self, reader: Reader) -> None:
        page = reader.page
        reader.open("samples", run="main", sort="reward", order="desc")
        page.wait_for_selector("[role=grid] [aria-selected]")
        page.keyboard.press("j")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("j")
        page.keyboard.press("k")
        assert page.locator("[role=grid] [aria-selected=true]").get_attribute("aria-rowindex") == "3"
        link = page.url
        page.keyboard.press("g")
        reader.hash("#/group")
        page.go_back()
        page.wait_for_selector("[role=grid] [aria-selected=true]")
        assert page.url == link
        page.keyboard.press("Enter")
        reader.hash("#/sample?")

    def test_all_rows_can_be_reached(self, reader: Reader) -> None:
        page = reader.page
        reader.open("samples", run="main")
        page.wait_for_selector("[role=grid] [aria-selected]")
        total = int(page.get_by_role("grid").get_attribute("aria-rowcount")) - 1
        assert total > 1500
        for _ in range(40):
            page.evaluate("document.querySelector('[role=grid]').scrollTop = 1e9")
            page.wait_for_timeout(50)
            last = page.locator("[role=grid] [aria-selected]").last.get_attribute("aria-rowindex")
            if int(last) == total + 1:
                break
        assert int(last) == total + 1
        assert page.locator("[role=grid] [aria-selected]").count() < 80  # only what is in sight is in the page

    def test_sample(self, reader: Reader, runs: Path) -> None:
        page = reader.page
        lines = (runs / "main" / "samples.jsonl").read_text().splitlines()
        longest = max(range(len(lines)), key=lambda i: json.loads(lines[i])["length"])
        reader.open("sample", run="main", id=longest)
        page.get_by_label("Colour by").select_option("advantage")
        reader.hash("signal=advantage")
        reader.shows("of 8,200")
        assert page.locator("[data-t]").count() == 4096
        page.locator("[data-t='5']").hover()
        point = page.locator("output.point")
        assert "token 5" in point.inner_text()
        page.locator("[data-t='5']").focus()
        page.keyboard.press("ArrowRight")
        assert "token 6" in point.inner_text() and "entropy" in point.inner_text()
        reader.button("later", exact=True).click()
        reader.hash("from=4096")
        page.locator("[data-t='4096']").wait_for()
        reader.button("earlier", exact=True).click()
        page.locator("canvas").first.hover()
        page.get_by_text("The row as it was written").click()
        assert '"token_ids"' in page.locator("details pre").inner_text()
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        reader.button("Copy link").click()
        assert page.evaluate("navigator.clipboard.readText()") == page.url
        page.keyboard.press("]")
        page.get_by_role("heading", name=f"Sample {longest + 1:,}").wait_for()
        page.keyboard.press("[")
        page.get_by_role("heading", name=f"Sample {longest:,}").wait_for()
        page.keyboard.press("g")
        reader.hash("#/group")

    def test_text_of_a_model_is_nothing_but_text(self, reader: Reader, runs: Path) -> None:
        lines = (runs / "main" / "samples.jsonl").read_text().splitlines()
        odd = next(i for i, line in enumerate(lines) if "<script>" in line)
        for screen, parameters in (("sample", {"id": odd}), ("samples", {"q": "odd"})):
            reader.open(screen, run="main", **parameters)
            reader.page.get_by_text("<script>").first.wait_for()
            text = reader.page.locator("main").inner_text()
            assert r"\u0000" in text and r"\u202e" in text and "\u202e" not in text
            assert reader.page.locator("main script, main img, main b:has-text('bold')").count() == 0

    def test_turns_of_an_episode(self, reader: Reader) -> None:
        reader.open("sample", run="episodes", id=0)
        turns = reader.page.locator("section", has=reader.page.get_by_role("heading", name="Turns"))
        assert turns.locator("li.assistant").count() >= 1 and turns.locator("li.tool").count() >= 1

    def test_group(self, reader: Reader, runs: Path) -> None:
        page = reader.page
        row = json.loads((runs / "main" / "samples.jsonl").read_text().splitlines()[40])
        reader.open("group", run="main", step=row["step"], group=row["group_id"])
        articles = page.get_by_role("article")
        assert articles.count() == len(row["group_rewards"])
        assert page.locator("ins, del").count() > 0
        format_ = articles.first.get_by_role("listitem").filter(has_text="format")
        assert "weight 0.2" in format_.inner_text() and "Shown: contributions" in articles.first.inner_text()
        reader.button("Word differences").click()
        reader.until("() => !document.querySelector('ins, del')")
        articles.first.get_by_role("link").click()
        reader.hash("#/sample?")

    def test_distributions(self, reader: Reader) -> None:
        page = reader.page
        reader.open("distributions", run="main")
        heat = page.get_by_role("application", name="reward over steps")
        heat.focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowUp")
        assert "samples" in page.locator("figure output").first.inner_text()
        heat.locator("canvas").click(position={"x": 40, "y": 30})
        reader.hash("in-reward=")
        page.go_back()
        page.get_by_label("y axis").select_option("advantage")
        page.get_by_label("x axis").select_option("reward")
        cloud = page.get_by_role("application", name=re.compile("advantage against reward"))
        cloud.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        reader.hash("#/sample?")

    def test_triage_leads_to_the_samples(self, reader: Reader) -> None:
        reader.open("triage", run="main")
        reader.page.get_by_role("link", name="All such samples").first.click()
        reader.hash("filter=")
        reader.page.wait_for_selector("[role=grid] [aria-selected]")

    def test_compare(self, reader: Reader) -> None:
        page = reader.page
        reader.open("compare", run="main")
        reader.shows("Choose runs to compare with this one")
        page.locator("summary", has_text="Compare with").click()
        page.get_by_role("checkbox", name="honest").check()
        page.get_by_role("cell", name="learner.learning_rate").wait_for()
        page.get_by_label("Names containing").fill("heldout")
        names = page.get_by_role("group", name="Metrics").locator("tbody tr td:first-child").all_inner_texts()
        assert names and all("heldout" in name for name in names)
        page.locator(".prompt a").first.click()
        reader.hash("#/sample?")

    def test_time_config_and_results(self, reader: Reader) -> None:
        page = reader.page
        reader.open("time", run="main")
        page.locator(".column").nth(1).hover()
        assert "step 2" in page.locator("table th").nth(1).inner_text()
        reader.open("config", run="main")
        page.get_by_label("Keys containing").fill("learning")
        assert page.locator("tbody").first.locator("tr").count() == 1
        page.get_by_role("link", name="config.yaml").click()
        page.get_by_role("group", name="config.yaml").get_by_text("total_steps").wait_for()
        reader.open("overview", run="evaluation_first")
        page.get_by_role("link", name="Results", exact=True).click()
        measured = page.get_by_role("group", name="Results")
        measured.get_by_role("cell", name="pass@8").wait_for()
        assert "in words" not in measured.inner_text()  # it has none
        differences = page.get_by_role("group", name="Paired differences")
        assert "step 60 is better" in differences.inner_text()
        assert differences.bounding_box()["y"] < measured.bounding_box()["y"]

    def test_what_is_not_there_is_said(self, reader: Reader) -> None:
        reader.open("overview", run="gone")
        reader.shows("There is no run “gone” here")
        reader.open("group", run="main")
        reader.shows("Choose a sample in the")

    def test_theme_help_and_skipping(self, reader: Reader) -> None:
        page = reader.page
        reader.open("overview", run="main")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.tagName") == "MAIN"
        page.keyboard.press("?")
        page.get_by_role("dialog").get_by_role("button", name="Close").click()
        assert not page.get_by_role("dialog").is_visible()
        page.get_by_label("Theme").select_option("dark")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_label("Theme").select_option("light")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.get_by_role("combobox", name="Run").select_option("honest")
        reader.hash("run=honest")

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_accessibility(self, browser: Any, address: str, runs: Path, theme: str) -> None:
        from axe_playwright_python.sync_playwright import Axe

        row = json.loads((runs / "main" / "samples.jsonl").read_text().splitlines()[40])
        group = {"step": row["step"], "group": row["group_id"]}
        screens = [(screen, {"with": "honest"}) for screen in SCREENS] + [("sample", {"id": 1}), ("group", group)]
        with reading(browser, address, color_scheme=theme, bypass_csp=True) as reader:
            for screen, parameters in [*screens, ("results", {"run": "evaluation_first"})]:
                reader.open(screen, **{"run": "main", **parameters})
                reader.page.wait_for_timeout(300)
                report = Axe().run(reader.page)
                assert report.violations_count == 0, f"{screen}, {theme}: {report.generate_report()}"


@pytest.mark.slow
class TestLive:
    """Of a run that grows while it is looked at."""

    def test_rows_come_without_moving_what_is_read(self, browser: Any, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", 1024, ended=False)
        files = {
            name: (run / name).read_bytes().splitlines(keepends=True) for name in ("metrics.jsonl", "samples.jsonl")
        }
        half = {name: lines[: len(lines) // 2] for name, lines in files.items()}
        for name, lines in half.items():
            (run / name).write_bytes(b"".join(lines))
        with serving(run, cache=tmp_path / "cache") as link, reading(browser, link) as reader:
            page = reader.page
            reader.open("samples")
            page.wait_for_selector("[role=grid] [aria-selected]")
            page.keyboard.press("j")
            page.evaluate("document.querySelector('[role=grid]').scrollTop = 100")
            with (run / "samples.jsonl").open("ab") as file:
                file.write(b"".join(files["samples.jsonl"][len(half["samples.jsonl"]) :])[:-20])  # a line half written
            new = len(files["samples.jsonl"]) - len(half["samples.jsonl"]) - 1
            button = page.get_by_role("button", name=f"{new} new, show them")
            button.wait_for()
            assert page.evaluate("document.querySelector('[role=grid]').scrollTop") == 100
            assert page.locator("[aria-selected=true]").count() == 1
            button.click()
            reader.counts(f"{len(half['samples.jsonl']) + new:,} samples")

            reader.open("overview")
            before = page.locator("progress").get_attribute("value")
            with (run / "metrics.jsonl").open("ab") as file:
                file.write(b"".join(files["metrics.jsonl"][len(half["metrics.jsonl"]) :]))
            reader.until("value => document.querySelector('progress').value !== Number(value)", before)

            reader.open("samples")  # a resume cuts the files back to its checkpoint
            page.wait_for_selector("[role=grid] [aria-selected]")
            for name, lines in half.items():
                (run / name).write_bytes(b"".join(lines[: len(lines) // 2]))
            reader.counts(f"{len(half['samples.jsonl']) // 2:,} samples")

    def test_a_folder_is_only_read(self, browser: Any, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", 256)
        before = sorted(run.rglob("*"))
        for path in [*before, run]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with serving(run, cache=tmp_path / "cache") as link, reading(browser, link) as reader:
            for screen in SCREENS:
                reader.open(screen)
        assert sorted(run.rglob("*")) == before

    def test_a_server_that_ends_and_comes_back_is_said(self, browser: Any, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", 64)
        context = browser.new_context()
        with serving(run, cache=tmp_path / "cache") as link:
            page = context.new_page()
            page.goto(link)
            page.get_by_role("heading", name="run").wait_for()
        page.get_by_text("not connected").wait_for()
        context.close()


@pytest.mark.slow
def test_components_of_a_single_reward_are_no_bar(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 64)
    (run / "config.yaml").write_text("reward: {_target_: rewards.function.FunctionReward, function: lengths.short}\n")
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    lines[1] |= {"components": {}, "reward": 0.25}
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving(run, cache=tmp_path / "cache") as link, reading(browser, link) as reader:
        account = reader.page.get_by_role("region", name=re.compile("^Reward "))
        reader.open("sample", id=0)
        reader.shows("need not add up")
        assert "format 1" in account.inner_text() and account.get_by_role("img").count() == 0
        reader.open("sample", id=1)
        reader.shows("lengths.short gave 0.25; it names no components")


@pytest.mark.slow
def test_a_report_is_the_page_without_a_server(browser: Any, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "main.html"
    write(runs / "main", file, 0.9)
    with reading(browser, file.as_uri()) as reader:
        page = reader.page
        for screen in SCREENS:
            reader.open(screen)
            assert page.get_by_role("alert").count() == 0, screen
        reader.open("curves", match="^reward.mean$")
        page.get_by_role("application", name=re.compile("^reward.mean over step. main: last")).wait_for()
        reader.open("samples", sort="reward", order="desc")
        reader.shows("of them in this report")
        rewards = [float(row.split("\n")[3]) for row in rows(reader)]
        assert rewards == sorted(rewards, reverse=True)
        page.get_by_label("Filter").fill("reward > 1")
        page.get_by_label("Filter").press("Enter")
        reader.shows("not in this report")
        reader.open("samples")
        page.locator("[role=grid] [aria-selected]").first.click()
        page.get_by_label("Colour by").select_option("entropy")
        page.locator("[data-t='3']").hover()
        assert "token 3" in page.locator("output.point").inner_text()
        page.keyboard.press("g")
        page.get_by_role("article").first.wait_for()


@pytest.mark.slow
def test_picture(browser: Any, address: str) -> None:
    """Where triage leads: a well-paid wrong answer, its tokens coloured by their process rewards."""
    with reading(browser, address, color_scheme="light") as reader:
        reader.open("samples", run="main", filter="tokens = true and correct = 0", sort="reward", order="desc")
        reader.page.locator("[role=grid] [aria-selected]").first.click()
        reader.page.locator("[data-t='8']").hover()
        PICTURE.parent.mkdir(exist_ok=True)
        reader.page.screenshot(path=PICTURE)
    assert PICTURE.stat().st_size < 300_000
