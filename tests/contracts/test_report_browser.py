"""The report in a real Chromium: charts are drawn, in light and dark, on a phone and on paper."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rayft.report import write_report
from tests.browser import Browser, chromium
from tests.ledgers import write_sweep

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")

MARKS = "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('path').length)"
WIDTH = "document.documentElement.scrollWidth"
INK = "getComputedStyle(document.querySelector('#curves .xtick text')).fill"
COLUMN = "[...document.querySelectorAll('#trials tbody tr')].map(r => r.cells[{0}].textContent)"
CLICK = "document.querySelectorAll('#trials thead button')[{0}].click()"


def visit(tmp_path: Path, trials: int, steps: Callable[[Browser, Path], Awaitable[None]]) -> None:
    """Do `steps` with a page of a sweep; nothing may be logged or asked for meanwhile."""
    home = write_sweep(tmp_path, trials, lost=0.95)
    write_report(home)
    page = home.local_path("report.html")
    assert page is not None

    async def go() -> None:
        async with Browser(tmp_path / "profile") as browser:
            await steps(browser, page)
            assert browser.said == []

    asyncio.run(go())


def test_all_charts_are_drawn_and_follow_the_reader(tmp_path: Path) -> None:
    async def steps(browser: Browser, page: Path) -> None:
        await browser.open(page)
        marks = await browser.ask(MARKS)
        assert len(marks) == 14 and min(marks) >= 4, "paths in every chart"
        assert await browser.ask("document.querySelectorAll('#strip .point').length") >= 35
        light = await browser.ask(INK)
        await browser.dark(True)
        dark = await browser.ask(INK)
        assert light == "rgb(99, 104, 109)" and dark == "rgb(162, 166, 171)"
        await browser.ask(CLICK.format(9))  # engine time
        first = await browser.ask(COLUMN.format(9))
        await browser.ask(CLICK.format(9))
        assert first == sorted(first, key=lambda text: float(text.split()[0]))
        assert (await browser.ask(COLUMN.format(9)))[0] == first[-1]

    visit(tmp_path, 40, steps)


def test_a_phone_and_paper(tmp_path: Path) -> None:
    async def steps(browser: Browser, page: Path) -> None:
        await browser.open(page, 390, dark=True)
        assert await browser.ask(WIDTH) == 390
        wide = "[...document.querySelectorAll('.chart svg')].map(s => s.clientWidth)"
        assert max(await browser.ask(wide)) <= 390
        await browser.ask(
            "addEventListener('beforeprint', () => { window.paper = ["
            f"{INK}, Math.max(...{wide}), getComputedStyle(document.body).color]; }})"
        )
        paper = await browser.pdf()
        assert paper.startswith(b"%PDF") and len(paper) > 50_000
        ink, width, text = await browser.ask("window.paper")
        assert (ink, text) == ("rgb(99, 104, 109)", "rgb(27, 29, 31)"), "printed dark on white"
        assert 390 < width <= 700
        await browser.frame()
        assert await browser.ask(INK) == "rgb(162, 166, 171)", "and dark again on the screen"

    visit(tmp_path, 20, steps)


def test_a_page_without_charts_is_quiet(tmp_path: Path) -> None:
    async def steps(browser: Browser, page: Path) -> None:
        await browser.open(page, 390)
        assert await browser.ask("document.querySelector('.lead').textContent")
        assert await browser.ask(WIDTH) == 390

    visit(tmp_path, 0, steps)
