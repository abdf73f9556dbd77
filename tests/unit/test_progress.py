"""Progress bars: what they count and what they say."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console
from rich.progress import Progress

from openmm_hvpcg import progress
from openmm_hvpcg.progress import track


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=True, width=160))
    return text


def test_counts_from_many_threads(screen: io.StringIO) -> None:
    with track("label x", 4000, "frames") as advance, ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: advance(2), range(2000)):
            pass
    assert "label x" in screen.getvalue()
    assert "4000/4000" in screen.getvalue()


def test_hidden_shows_nothing(screen: io.StringIO) -> None:
    with track("quiet", 10, "frames", show=False) as advance:
        advance(10)
    assert screen.getvalue() == ""


def test_an_error_inside_passes_and_leaves_the_bar_clean(screen: io.StringIO) -> None:
    with pytest.raises(ZeroDivisionError), track("x", 2, "frames"):
        raise ZeroDivisionError
    with track("y", 1, "frames") as advance:  # a bar left alive would refuse a second one
        advance(1)
    assert "1/1" in screen.getvalue()


@pytest.mark.parametrize(("ns", "expected"), [(None, "20 frames/s"), (0.001, "1728 ns/day")])
def test_speed(ns: float | None, expected: str) -> None:
    now = [0.0]
    bar = Progress(get_time=lambda: now[0], disable=True)
    number = bar.add_task("x", total=1000, unit="frames", ns_per_item=ns)
    column = progress._RateColumn()
    assert str(column.render(bar.tasks[0])) == ""  # no speed before the first item
    for _ in range(10):
        now[0] += 1.0
        bar.advance(number, 20)
    # 20 frames/s of 0.001 ns each: 0.02 ns/s * 86400 s/day = 1728 ns/day
    assert str(column.render(bar.tasks[0])) == expected
