"""Where each control of the page leads, of those that test_page.py does not use; and one of each kind that is found on
any screen, whether or not another test knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_fixture import ROOT, Reader, reading

from rlkit.view.report import write

pytestmark = pytest.mark.slow
CONTROLS = """() => [...(document.querySelector("dialog[open]") ?? document).querySelectorAll(
        "a:not(.skip), button, summary, select, input, [role=application], [role=option], [role=row][aria-selected]"
    )]
    .filter(element => element.checkVisibility() && !element.disabled)
    .map(element => {
        const data = element.closest(
            "td, figure, details:has(> summary > h2), [role=columnheader], .tile, .laid, .prompt, .peers, .bars, " +
            "[role=listbox], [aria-selected]"
        );
        const label = element.ariaLabel ?? (element.labels?.[0]?.firstChild ?? element).textContent;
        const name = (data ? data.className || data.tagName : label).replace(/svelte-\\w+|[-+−\\d.,]+/g, "").trim();
        const screen = element.closest("main") ? location.hash.match(/\\w+/)[0] : "everywhere";
        return { element, kind: `${screen}: ${element.tagName} ${element.type ?? ""} ${name}` };
    })"""
"""Those that a reader sees, by kind: the name without its numbers, or the place of a name that is data."""

ROWS = "[...document.querySelectorAll('[role=grid] [aria-selected]')]"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def heading(reader: Reader, text: str) -> None:
    reader.page.get_by_role("heading", name=text, level=1, exact=True).wait_for()


def check(reader: Reader) -> None:
    """By axe's rules."""
    from axe_playwright_python.sync_playwright import Axe

    report = Axe().run(reader.page)
    assert report.violations_count == 0, f"{reader.page.url}: {report.generate_report()}"


def shows_step(reader: Reader, step: int) -> None:
    """The list, of this step alone."""
    reader.hash(f"&step={step}")
    reader.page.wait_for_selector("[role=grid] [aria-selected]")
    reader.until(f"step => {ROWS}.every(row => row.innerText.split(/\\s/)[0] === step)", str(step))


class TestWhereControlsLead:
    def test_navigation(self, reader: Reader) -> None:
        headings = {"Time": "Where time goes", "Config": "Config, logs, files", "Overview": "evaluation_first"}
        reader.open("overview", run="evaluation_first")
        links = reader.page.get_by_role("navigation").get_by_role("link")
        assert links.count() == 9
        for link in [*links.all()[1:], links.first]:
            link.click()
            heading(reader, headings.get(link.inner_text(), link.inner_text()))
            assert link.get_attribute("aria-current") == "page"

    def test_sample(self, reader: Reader, runs: Path) -> None:
        page, rows = reader.page, lines(runs / "main")
        reader.open("sample", run="main", id=40)
        reader.button("Next").click()
        heading(reader, "Sample 41")
        reader.button("Previous").click()
        heading(reader, "Sample 40")
        peer = page.locator(".peers a:not([aria-current=true])").first
        number = int(peer.inner_text().split()[0].removeprefix("#"))
        peer.click()
        group = rows[40]["group_id"]
        chosen = next(i for i, row in enumerate(rows) if row["group_id"] == group and row["sample"] == number)
        heading(reader, f"Sample {chosen}")
        page.get_by_role("link", name="Group").click()
        heading(reader, f"Group {group}")
        page.get_by_role("link", name=f"Step {rows[40]['step']}", exact=True).click()
        shows_step(reader, rows[40]["step"])
        reader.open("sample", run="main", id=40)
        page.get_by_role("link", name=f"Step {rows[40]['step']}", exact=True).click()
        shows_step(reader, rows[40]["step"])
        page.go_back()
        page.get_by_role("link", name="All samples of this prompt").click()
        reader.counts(f"{sum(row['prompt_id'] == rows[40]['prompt_id'] for row in rows)} samples")

    def test_rewards_of_steps(self, reader: Reader) -> None:
        reader.open("sample", run="episodes", id=0)
        steps = reader.page.get_by_role("region", name="Step rewards").get_by_role("button")
        assert steps.count() > 1
        steps.nth(1).click()
        assert "token 6" in reader.page.locator("output.point").inner_text()

    def test_prompts_of_both_runs(self, reader: Reader, runs: Path) -> None:
        reader.open("compare", run="main", **{"with": "honest"})
        more = reader.button("More prompts")
        more.wait_for()
        common = set.intersection(*({row["prompt_id"] for row in lines(runs / name)} for name in ("main", "honest")))
        while more.count():
            before = reader.page.locator(".prompt").count()
            more.click()
            reader.until("before => document.querySelectorAll('.prompt').length > before", before)
        assert reader.page.locator(".prompt").count() == len(common)

    def test_results(self, reader: Reader, runs: Path) -> None:
        page = reader.page
        reader.open("overview", run="evaluation_first")
        page.get_by_role("link", name="Results of this evaluation").click()
        heading(reader, "Results")
        page.locator("summary", has_text="Settings, versions and data").click()
        assert '"judge": "verifier=math"' in page.locator("details pre").inner_text()
        page.get_by_role("link", name="The answers").click()
        reader.counts(f"{len(lines(runs / 'evaluation_first'))} samples")

    def test_triage(self, reader: Reader) -> None:
        page = reader.page
        reader.open("triage", run="main")
        row = page.locator("td a").first
        number = int(row.inner_text())
        row.click()
        heading(reader, f"Sample {number:,}")
        page.go_back()
        page.locator("main").get_by_role("link", name="Curves").first.click()
        heading(reader, "Curves")
        assert page.get_by_label("Names matching").input_value().startswith("^")
        page.get_by_role("application").first.wait_for()

    def test_steps_of_a_light(self, reader: Reader) -> None:
        reader.open("overview", run="main")
        light = reader.page.locator("details", has_text="seen at step").first
        light.locator("summary").click()
        link = light.locator("a[href*='/samples']").first
        step = int(link.inner_text())
        link.click()
        shows_step(reader, step)

    def test_a_server_that_refuses_more_prompts_is_said(self, reader: Reader) -> None:
        reader.open("compare", run="main", **{"with": "honest"})
        reader.expected = "503 (Service Unavailable)"
        reader.page.route("**/api/compare?cursor=*", lambda route: route.fulfill(status=503, body="{}"))
        reader.button("More prompts").click()
        reader.page.locator("main").get_by_role("alert").get_by_text("The server answered 503").wait_for()

    def test_a_browser_that_keeps_its_clipboard_is_said(self, reader: Reader) -> None:
        reader.open("sample", run="main", id=40)
        reader.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')) }")
        reader.button("Copy link").click()
        reader.button("Use the page's address").wait_for()

    @pytest.mark.parametrize("screen", ["sample", "group"])
    def test_a_screen_of_nothing_leads_to_the_list(self, reader: Reader, screen: str) -> None:
        reader.open(screen, run="main")
        reader.page.locator("main").get_by_role("link", name="list").click()
        heading(reader, "Samples")


class TestAccessibility:
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_help(self, browser: Any, address: str, theme: str) -> None:
        with reading(browser, address, color_scheme=theme, bypass_csp=True) as reader:
            reader.open("overview", run="main")
            reader.button("Help").click()
            reader.page.get_by_role("dialog").wait_for()
            check(reader)

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_report(self, browser: Any, runs: Path, tmp_path: Path, theme: str) -> None:
        write(runs / "main", tmp_path / "main.html", 3.0)
        with reading(browser, (tmp_path / "main.html").as_uri(), color_scheme=theme, bypass_csp=True) as reader:
            for screen in ("overview", "samples", "triage"):
                reader.open(screen)
                check(reader)
            reader.page.locator("td a").first.click()
            reader.shows("In its group")
            check(reader)


def use(element: Any) -> None:
    """In all ways that a reader has."""
    match element.evaluate("element => element.type ?? element.tagName"):
        case "select-one":
            for value in element.evaluate("element => [...element.options].map(({ value }) => value)"):
                element.select_option(value)
        case "number":
            element.fill("2")
            element.press("Enter")
        case "range":
            element.fill("0.5")
        case "text" | "search":
            element.fill(element.get_attribute("placeholder") or "a")
            element.press("Enter")
        case "SUMMARY":
            element.click()
            if not element.evaluate("element => element.parentElement.open"):
                element.click()
        case _:
            element.click()


def use_each_kind(reader: Reader, used: list[str], screen: str, parameters: dict[str, object]) -> None:
    """One control of each kind of this screen that is not among the `used` ones; what it opens comes next."""
    reader.open(screen, **parameters)
    began = reader.page.evaluate("location.hash")
    while True:
        reader.rests()
        found = reader.page.evaluate_handle(f"used => ({CONTROLS})().find(({{ kind }}) => !used.includes(kind))", used)
        kind = found.evaluate("found => found?.kind")
        if kind is None:
            return
        used.append(kind)
        print(kind)
        use(found.get_property("element").as_element())
        reader.rests()
        assert reader.page.get_by_role("alert").all_inner_texts() == reader.complaints == [], kind
        if reader.page.evaluate("location.hash") != began:
            (reader.open if kind.startswith("everywhere") else reader.go)(screen, **parameters)


def test_each_kind_of_control_can_be_used(reader: Reader, runs: Path) -> None:
    rows = lines(runs / "main")
    longest = max(range(len(rows)), key=lambda i: rows[i]["length"])
    visits: list[tuple[str, dict[str, object]]] = [
        ("overview", {}),
        ("overview", {"run": "evaluation_first"}),
        ("results", {"run": "evaluation_first"}),
        ("curves", {"with": "honest"}),
        ("compare", {"with": "honest"}),
        ("distributions", {}),
        ("triage", {}),
        ("time", {}),
        ("config", {}),
        ("samples", {"from_step": 2, "to_step": 9, "in-reward": "-1..2"}),
        ("sample", {}),
        ("sample", {"id": 1}),
        ("sample", {"id": longest, "from": 4096}),
        ("sample", {"run": "episodes", "id": 1}),
        ("group", {}),
        ("group", {"step": rows[40]["step"], "group": rows[40]["group_id"]}),
    ]
    screens = {path.stem.lower() for path in (ROOT / "view" / "src" / "screens").glob("*.svelte")}
    assert {screen for screen, _ in visits} == screens
    reader.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    used: list[str] = []
    for screen, parameters in visits:
        use_each_kind(reader, used, screen, {"run": "main", **parameters})
