"""The page of a report, as a file and in a browser. Manifests and logs are written by hand; nothing is trained."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from html import escape, unescape
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
import test_paper_table
from apt import program
from hypothesis import given
from hypothesis import strategies as st
from test_figures import write_log
from test_report import LEDGER, SWEEP, Sweep

from packcli.data import index as indexes
from packcli.packing import Rows
from packcli.report import charts, notes, paper, pictures, words
from packcli.report.page import svg, write
from packcli.store import Store

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "</script><script>document.title='caught'</script><b>x.jsonl"
TWO_SETTINGS = SWEEP.replace("arm: [padding", "train.lr: [1e-3, 2e-3]\n  arm: [padding")

Make = Callable[..., Sweep]


@pytest.fixture
def finished(tmp_path: Path) -> Make:
    """Every cell done; `scores(arm, seed)`: the score of both tasks."""

    def build(text: str = SWEEP, scores: Callable[[str, int], float] | None = None) -> Sweep:
        sweep = Sweep(text, tmp_path)
        for cell in sweep.plan.cells:
            arm, seed = cell.labels["arm"], int(cell.labels["seed"])
            padded = arm == "padding"
            slots, steps = (6400, 40) if padded else (3200, 20)
            sweep.trained(cell, steps=steps, slots=slots, cpu_s=10.0 + seed)
            parts = {"validation": 10, "dropped": 30, "boundary": 0, "padding": slots - LEDGER["tokens_kept"]}
            ledger = sweep.store.manifest("index", cell.index).results["ledger"]
            whole = ledger | {f"tokens_{word}": tokens for word, tokens in parts.items()}
            sweep.finish("index", cell.index, {"ledger": whole})
            write_log(sweep, cell.train, [seed + 4.0 / (step + 1) for step in range(20)])
            for task in cell.evals:
                sweep.scored(cell, task, scores(arm, seed) if scores else 0.5 + seed / 100)
        return sweep

    return build


def page_of(sweep: Sweep) -> str:
    return write.document(sweep.plan, sweep.store, sweep.report())


class Elements(HTMLParser):
    """(tag, attributes) of every element, its text where it holds nothing else; raises where tags do not nest."""

    VOID = frozenset({"meta", "link", "input", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1] if self._open else "", data.strip()))

    def text_of(self, tag: str) -> list[str]:
        return [text for own, text in self.texts if own == tag]


def drawn(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


# What the file holds -------------------------------------------------------------------------------------


def test_equal_runs_give_unlike_pages(finished: Make) -> None:
    sweep = finished()
    assert page_of(sweep) == page_of(sweep)


def test_a_label_becomes_markup_or_closes_the_data(finished: Make) -> None:
    sweep = finished(
        SWEEP.replace("source: tiny", f'source: "{HOSTILE}"').replace(
            "matrix:", "matrix:\n  data.source: [tiny, " + f'"{HOSTILE}"]'
        )
    )
    page = page_of(sweep)
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == 3
    assert not [tag for tag, _ in elements.found if tag == "b"]
    held = json.loads(elements.text_of("script")[1])
    assert held["groups"][-1]["labels"]["data.source"] == HOSTILE
    assert any(HOSTILE in text for text in elements.text_of("span"))  # and is shown as it is


def test_the_page_asks_a_network_or_runs_what_is_not_ours(finished: Make) -> None:
    page = page_of(finished())
    elements = Elements(page)
    for tag, attributes in elements.found:
        for name in ("src", "href", "action", "xlink:href"):
            assert (attributes.get(name) or "#")[0] == "#" or (tag, attributes.get(name)) == ("link", "data:,")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    (policy,) = [
        one["content"] for tag, one in elements.found if one.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    for text in re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.DOTALL):
        assert "url(" not in text
        assert "@import" not in text
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy


def test_numbers_in_the_page_are_not_the_reports(finished: Make) -> None:
    sweep = finished()
    held = json.loads(Elements(page_of(sweep)).text_of("script")[1])
    assert held == sweep.report().model_dump(mode="json")


def test_a_chart_says_nothing_to_those_who_do_not_see_it(finished: Make) -> None:
    figures = drawn(page_of(finished(TWO_SETTINGS)))
    assert (
        len(figures) == 13
    )  # differences, 2 x loss, throughput, efficiency, speed-up of two settings; the ledger
    ids = [one.get("id") for figure in figures for one in figure.iter() if one.get("id")]
    assert len(ids) == len(set(ids)) == 2 * len(figures)
    for figure in figures:
        title, about = figure[0], figure[1]
        assert figure.get("aria-labelledby") == f"{title.get('id')} {about.get('id')}"
        assert title.text
        assert "best_fit" in (about.text or "")


def test_a_table_or_a_chart_on_made_up_data_does_not_say_so(finished: Make) -> None:
    elements = Elements(page_of(finished()))
    tags = [tag for tag, _ in elements.found]
    notes = [
        text for text in elements.text_of("span") if text == "synthetic data · toy model · from random weights"
    ]
    assert len(notes) == tags.count("table") + tags.count("figure") + 1


def test_a_failed_cell_or_a_hole_is_not_shown(finished: Make) -> None:
    sweep = finished()
    for seed in "123":
        cell = sweep.cell(arm="best_fit", seed=seed)
        sweep.store.manifest_file("train", cell.train).unlink()
        for id_ in cell.evals.values():
            sweep.store.manifest_file("eval", id_).unlink()
        sweep.fail("train", cell.train, "loss is <nan>")
    page = page_of(sweep)
    assert "loss is &lt;nan&gt;" in page
    assert "6 cells: 3 done, 3 failed" in page
    (line,) = lines_of(page, "best_fit")
    assert line.count('class="missing failed">failed') >= 3  # the average and both tasks
    assert "0.0" not in line


def test_a_number_that_cannot_be_true_is_not_said_before_the_verdict(finished: Make) -> None:
    sweep = finished()
    cell = sweep.cell(arm="padding", seed="1")
    sweep.finish("train", cell.train, sweep.store.manifest("train", cell.train).results | {"mfu": 1.5})
    task = sweep.cell(arm="best_fit", seed="2").evals["copy"]
    sweep.store.manifest_file("eval", task).write_bytes(b"torn")
    page = page_of(sweep)
    (told,) = re.findall(r'<section id="problems" class="broken">.*?</section>', page, re.DOTALL)
    assert page.index(told) < page.index('<section id="verdict">')
    assert re.search(r"wrong, cannot be true of a training: .*MFU", told)
    assert "failed, eval copy" in told
    for line in notes.problems(sweep.report()):
        assert escape(line.split(":")[0]) in told


def test_a_whole_sweep_is_said_to_lack_something(finished: Make) -> None:
    assert 'id="problems"' not in page_of(finished())


def lines_of(page: str, arm: str) -> list[str]:
    """Of each setting the line of the arm among the scores."""
    return [row for row in re.findall(r"<tr>.*?</tr>", scores_of(page), re.DOTALL) if f">{arm}<" in row]


def scores_of(page: str) -> str:
    (found,) = re.findall(r'<table id="scores">.*?</table>', page, re.DOTALL)
    return str(found)


def test_a_difference_inside_its_interval_is_set_off(finished: Make) -> None:
    unsure = scores_of(
        page_of(finished(scores=lambda arm, seed: 0.5 + (seed - 2) * (0.1 if arm == "best_fit" else 0.0)))
    )
    assert "shown" not in unsure
    assert 'class="change"' in unsure
    assert not re.search(r"change (up|down)", unsure)  # nor is it coloured
    sure = scores_of(
        page_of(finished(scores=lambda arm, seed: 0.5 - (0.2 + seed / 100 if arm == "best_fit" else 0.0)))
    )
    assert re.search(r'data-v="-0\.2[12]\d*"><span class="change down shown">-2[12]', sure)
    assert len(re.findall(r"change (?:up|down)", sure)) == 1  # single tasks have no interval


def test_a_difference_is_set_off_that_a_correction_for_all_of_them_does_not_show(finished: Make) -> None:
    """Six settings: an interval that leaves out 0 by itself is no difference yet."""
    rates = ", ".join(f"{number}e-3" for number in range(1, 7))
    text = SWEEP.replace("arm: [padding", f"train.lr: [{rates}]\n  arm: [padding")
    sweep = finished(text, lambda arm, seed: 0.5 + (0.006 + 0.002 * seed if arm == "best_fit" else 0.0))
    group = next(group for group in sweep.report().groups if group.arm == "best_fit")
    assert group.interval is not None
    assert group.p_holm is not None
    assert group.interval[0] > 0
    assert group.p_holm > 0.05
    page = page_of(sweep)
    lines = lines_of(page, "best_fit")
    assert len(lines) == 6
    assert words.p_value(group.p_holm) in lines[0]
    assert not [line for line in lines if "shown" in line]
    differences = next(one for one in drawn(page) if "Average score" in (one[0].text or ""))
    assert f"p {words.p_value(group.p_holm)}" in (differences[1].text or "")
    assert not [one for one in differences.iter() if one.get("class") == "sure"]


def test_a_single_cell_is_shown_its_groups_mean(finished: Make) -> None:
    sweep = finished()
    for number, seed in enumerate("123"):
        sweep.scored(sweep.cell(arm="padding", seed=seed), "copy", 0.5, health={"empty": 0.1 * number})
    page = write.document(sweep.plan, sweep.store, sweep.report(), everything=True)
    (table,) = re.findall(r'<table id="health">.*?</table>', page, re.DOTALL)
    assert re.findall(r'data-v="[^"]*">([^<]*)<', table) == ["10.0", "0", "10.0", "20.0"]  # the group, then seeds


def test_the_paper_is_asked_for_and_not_shown(tmp_path: Path) -> None:
    made, report = test_paper_table.finished(tmp_path)
    against = paper.compare(made, report)
    page = write.document(made, Store(tmp_path / "runs"), report, against)
    (table,) = re.findall(r'<table id="paper">.*?</table>', page, re.DOTALL)
    for row in (row for _, rows in against.sheet().blocks for row in rows):
        assert [text for cell in row for text in cell.lines if f">{text.strip()}<" not in table] == []
    assert "aria-sort" not in table  # its rows belong together by three
    assert len(re.findall('<tr class="part">', table)) == 2 * len(re.findall("<tr>.*paper</th>", table)) > 0
    assert [line for line in against.legend() if line not in unescape(page)] == []
    assert json.loads(Elements(page).text_of("script")[1])["against"] == against.model_dump(mode="json")


def test_a_large_sweep_makes_a_page_without_end(finished: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "CELLS", 7)
    monkeypatch.setattr(pictures, "SETTINGS", 1)
    monkeypatch.setattr(pictures, "SETS", 0)
    sweep = finished(TWO_SETTINGS)
    page = page_of(sweep)
    scores = scores_of(page)
    assert scores.count('class="single"') == 6  # whole groups
    assert len(re.findall(r'<th scope="row">(?:padding|best_fit)</th>', scores)) == 4
    assert len(drawn(page)) == 6
    for said in ("Single cells: 6 of 12", "Charts: of the first 1 of 2 settings", "1 more data sets"):
        assert said in page
    monkeypatch.setattr(write, "CELLS", 3)
    page = page_of(sweep)
    assert "Numbers that can be saved here: the groups are too many." in page
    assert len(re.findall(r'<th scope="row">(?:padding|best_fit)</th>', scores_of(page))) == 4


def test_a_log_or_a_store_that_is_gone_stops_the_page(finished: Make) -> None:
    sweep = finished()
    cell = sweep.cell(arm="padding", seed="2")
    sweep.store.metrics(cell.train).unlink()
    sweep.store.metrics(sweep.cell(arm="padding", seed="3").train).write_text("{torn")
    assert "Left out: 2 whose log cannot be read." in page_of(sweep)


def test_rows_of_an_arm_are_counted_wrongly(finished: Make) -> None:
    sweep = finished()
    cell = sweep.cell(arm="best_fit", seed="1")
    lengths = np.array([64, 64, 30])
    none = np.zeros(3, np.int64)
    found = Rows(np.arange(3), none, lengths, np.arange(4))
    path = sweep.store.rows(cell.index)
    indexes.write(path, indexes.Index(found, lengths, none, none + 1, none, np.array([0, 3])))
    page = page_of(sweep)
    assert "3 rows, median 64, longest 64" in page
    assert "The token store is not here, so the documents are not shown." in page
    (strips,) = [one for one in drawn(page) if "how full" in (one[0].text or "")]
    heights = [float(one.get("height", 0)) for one in strips.iter() if one.get("class", "").startswith("bar")]
    assert heights == [17.0, 34.0]  # one row of 30 tokens, two full ones
    path.write_bytes(b"torn")
    assert "how full" not in page_of(sweep)


def test_provenance_lacks_a_stage_or_its_software(finished: Make) -> None:
    sweep = finished()
    cell = sweep.cell(arm="padding", seed="1")
    page = page_of(sweep)
    (stages,) = re.findall(r'<table id="stages">.*?</table>', page, re.DOTALL)
    for id_ in (cell.index, cell.train, *cell.evals.values()):
        assert id_ in stages
    (ids,) = re.findall(r'<table id="ids">.*?</table>', page, re.DOTALL)
    assert ids.count(f"<code>{cell.train}</code>") == 1
    assert "packcli ?" in page  # these manifests name no version: that is said


# Charts --------------------------------------------------------------------------------------------------

FINITE = st.floats(-1e9, 1e9).map(lambda value: round(value, 6))


@given(FINITE, FINITE)
def test_an_axis_leaves_out_what_it_shows(a: float, b: float) -> None:
    low, high = sorted((a, b))
    found = svg.ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 9
    assert all(one < other for one, other in pairwise(found))


def about(**more: Any) -> dict[str, Any]:
    return {"title": "a", "caption": "b", "x_name": "x"} | more


def test_a_chart_of_one_number_of_zeros_or_of_nothing_known_divides_by_zero() -> None:
    bars = [("b", 0, [charts.Bar(0.0, "0")]), ("c", 1, [charts.Bar(None, "-")])]
    strip = charts.Strip("b", "c", 0, [0.0, 0.0])
    for chart in (
        charts.Curves(**about(), y_name="y", series=[charts.Series("b", 0, [(1.0, 2.0)])]),
        charts.Curves(**about(), y_name="y", series=[charts.Series("b", 0, [(0.0, 0.0), (1.0, 0.0)])]),
        charts.Bars(**about(), kinds=["kind"], rows=bars, mark=1.0),
        charts.Differences(
            **about(), points=[charts.Point("b", 0.0, "0", None, None, "items", False)], bounds=(0.0, 0.0)
        ),
        charts.Dots(**about(), kinds=["one", "two"], rows=[("b", [0.0, None])]),
        charts.Balance(**about(), kinds=[("one", "held"), ("two", "kept")], rows=[("b", [0.0, 0.0])], before=1),
        charts.Strips(**about(), edges=[0.0, 1.0, 2.0], limit=1.0, strips=[strip]),
    ):
        picture = svg.draw(chart, "id")
        marks = ElementTree.fromstring(picture).iter()
        numbers = [float(number) for one in marks for number in re.findall(r"-?[\d.]+", one.get("d", ""))]
        assert all(map(math.isfinite, numbers))
        assert "nan" not in picture


def test_a_small_part_of_a_ledger_is_not_seen() -> None:
    kinds = [("held out", "held"), ("truncated", "truncated"), ("kept", "kept"), ("padding", "padding")]
    chart = charts.Balance(**about(), kinds=kinds, rows=[("b", [1e6, 1.0, 1e9, 0.0])], before=2)
    picture = ElementTree.fromstring(svg.draw(chart, "i"))
    widths = {one.get("class"): float(one.get("width", 0)) for one in picture.iter()}
    assert widths["truncated"] == 1.5
    assert "padding" not in widths
    assert "1 truncated" in (picture[1].text or "")


def test_two_arms_look_alike() -> None:
    series = [charts.Series(f"arm {n}", n, [(0.0, 1.0), (1.0, 2.0)]) for n in range(24)]
    marks = ElementTree.fromstring(svg.draw(charts.Curves(**about(), y_name="y", series=series), "id")).iter()
    looks = [one.get("class") for one in marks if one.get("class", "").startswith("line") and len(one)]
    assert len(looks) == len(set(looks)) == 24


def test_an_arm_has_one_colour_on_the_page_and_another_in_its_files() -> None:
    light = (resources.files("packcli.report.page") / "page.css").read_text().partition("@media")[0]
    colours = {f"k{number}": colour for number, colour in enumerate(charts.COLOURS)} | charts.PARTS
    for name, colour in colours.items():
        assert f"--{name}: {colour};" in light


# In a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium; playwright only drives it and brings none of its own."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
    path = program("chromium", "chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        yield browser
        browser.close()


class Opened:
    """A page in the browser, and all that it said and asked for."""

    def __init__(self, browser: Browser, file: Path, **context: Any) -> None:
        self.page: Page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def column(self, table: str, number: int, setting: int = 0) -> list[str]:
        """Shown texts of a column (0: names), in the order they stand there."""
        rows = self.page.locator(f"#{table} tbody").nth(setting).locator("tr:not(.setting):visible")
        return [row.locator("th, td").nth(number).inner_text() for row in rows.all()]

    def head(self, table: str, name: str) -> Any:
        return self.page.locator(f"#{table} thead th", has_text=name)


@pytest.fixture
def opened(chromium: Browser, finished: Make, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Opens the page of a sweep of two settings; in the end nothing may have been said or asked for."""
    pages: list[Opened] = []

    def open_(sweep: Sweep | None = None, **context: Any) -> Opened:
        text = TWO_SETTINGS.replace("[padding, best_fit]", "[padding, padding_free, best_fit]")
        scores = {"padding": 0.5, "padding_free": 0.7, "best_fit": 0.6}
        sweep = sweep or finished(text, lambda arm, seed: scores[arm] + seed / 100)
        file = tmp_path / "report.html"
        file.write_text(page_of(sweep), encoding="utf-8")
        pages.append(Opened(chromium, file, **context))
        return pages[-1]

    yield open_
    for one in pages:
        assert one.said == []
        assert [url.partition("#")[0] for url in one.asked] == [(tmp_path / "report.html").as_uri()]
        one.page.context.close()


ARMS = ["padding", "padding_free", "best_fit"]


@pytest.mark.slow
def test_a_table_does_not_sort(opened: Callable[..., Opened]) -> None:
    shown = opened()
    head = shown.page.locator("#scores thead th").nth(1)  # the average
    assert shown.column("scores", 0) == ARMS
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    for setting in (0, 1):
        assert shown.column("scores", 0, setting) == ["padding", "best_fit", "padding_free"]
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert shown.column("scores", 0) == ["padding_free", "best_fit", "padding"]
    difference = shown.head("scores", "average less")
    difference.get_by_role("button").press("Space")
    assert head.get_attribute("aria-sort") == "none"
    assert shown.column("scores", 0) == ["best_fit", "padding_free", "padding"]  # the baseline has none: last
    difference.get_by_role("button").click()
    assert shown.column("scores", 0) == ["padding_free", "best_fit", "padding"]
    difference.get_by_role("button").click()
    assert shown.column("scores", 0) == ARMS


@pytest.mark.slow
def test_a_group_does_not_fold_or_single_cells_leave_theirs(opened: Callable[..., Opened]) -> None:
    shown = opened()
    first = shown.page.locator("#scores tr.setting button").first
    first.click()
    assert first.get_attribute("aria-expanded") == "false"
    assert (shown.column("scores", 0), shown.column("scores", 0, 1)) == ([], ARMS)
    first.press("Enter")
    assert first.get_attribute("aria-expanded") == "true"
    assert shown.column("scores", 0) == ARMS
    shown.page.get_by_label("show single cells").check()
    seeds = ["seed 1", "seed 2", "seed 3"]
    assert shown.column("scores", 0) == [name for arm in ARMS for name in (arm, *seeds)]
    shown.page.locator("#scores thead th").nth(1).get_by_role("button").click()
    ordered = ["padding", *seeds, "best_fit", *seeds, "padding_free", *seeds]
    assert shown.column("scores", 0) == ordered
    assert shown.column("scores", 1)[:4] == ["52.0 ± 0.6", "51.0 (± 3.5)", "52.0 (± 3.5)", "53.0 (± 3.5)"]
    first.click()
    assert shown.column("scores", 0) == []
    shown.page.locator("#fold").click()
    assert shown.column("scores", 0, 1) == []
    shown.page.locator("#fold").click()
    shown.page.get_by_label("show single cells").uncheck()
    assert shown.column("scores", 0) == ["padding", "best_fit", "padding_free"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_itself_scrolls_sideways(opened: Callable[..., Opened], width: int) -> None:
    shown = opened(viewport={"width": width, "height": 740})
    shown.page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    wide, inner = shown.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide == inner
    box = shown.page.locator("#part-costs .scroll")
    assert box.evaluate("box => box.clientWidth") <= width
    if width < 400:
        assert box.evaluate("box => box.scrollWidth > box.clientWidth")


@pytest.mark.slow
def test_a_table_that_is_cut_does_not_say_that_it_scrolls(opened: Callable[..., Opened]) -> None:
    shown = opened(viewport={"width": 390, "height": 740})
    hint, wide = (shown.page.locator(f"#part-scores {name}") for name in (".hint", ".wide"))
    sides = "one => [one.classList.contains('before'), one.classList.contains('behind')]"
    shown.page.wait_for_selector("#part-scores .wide.behind")
    assert hint.is_visible()
    assert wide.evaluate(sides) == [False, True]
    shown.page.locator("#part-scores .scroll").evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    shown.page.wait_for_selector("#part-scores .wide.before")
    assert wide.evaluate(sides) == [True, False]
    shown.page.set_viewport_size({"width": 1280, "height": 740})
    hint.wait_for(state="hidden")


@pytest.mark.slow
def test_light_and_dark_look_alike_or_text_cannot_be_read(opened: Callable[..., Opened]) -> None:
    """Contrast of WCAG: 4.5 for text, 3 for what charts draw."""
    grounds = set()
    for scheme in ("light", "dark"):
        shown = opened(color_scheme=scheme)
        colours = shown.page.evaluate(
            """() => {
              const style = getComputedStyle(document.documentElement);
              const names = ["ground", "raised", "text", "muted", "link", "good", "bad", "kept", "held",
                "truncated", "dropped", "boundary", ...Array.from({length: 8}, (_, n) => `k${n}`)];
              return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
            }"""
        )
        grounds.add(colours["ground"])
        for name in ("text", "muted", "link", "good", "bad"):
            for ground in ("ground", "raised"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (scheme, name)
        for name in ("kept", "held", "truncated", "dropped", "boundary", *(f"k{number}" for number in range(8))):
            assert contrast(colours[name], colours["ground"]) >= 3, (scheme, name)
    assert len(grounds) == 2


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.slow
def test_a_label_runs_as_a_script_in_a_real_browser(opened: Callable[..., Opened], finished: Make) -> None:
    text = SWEEP.replace("matrix:", f'matrix:\n  data.source: [tiny, "{HOSTILE}"]')
    shown = opened(finished(text))
    assert shown.page.title() == "demo: pack or pad"
    assert shown.page.locator("b").count() == 0
    assert shown.page.get_by_text(HOSTILE).count() > 0


@pytest.mark.slow
def test_without_scripts_nothing_can_be_read(opened: Callable[..., Opened]) -> None:
    shown = opened(java_script_enabled=False)
    names = shown.page.locator("#scores tbody").first.locator("tr th[scope=row]").all_inner_texts()
    assert names[:4] == ["padding", "seed 1", "seed 2", "seed 3"]
    assert shown.page.locator("#scores tr.single").first.is_visible()
    assert not shown.page.locator("#save").is_visible()


@pytest.mark.slow
def test_saved_numbers_are_not_those_of_the_report(
    opened: Callable[..., Opened], finished: Make, tmp_path: Path
) -> None:
    sweep = finished()
    shown = opened(sweep)
    with shown.page.expect_download() as download:
        shown.page.locator("#save").click()
    download.value.save_as(tmp_path / "saved.json")
    assert json.loads((tmp_path / "saved.json").read_bytes()) == sweep.report().model_dump(mode="json")
