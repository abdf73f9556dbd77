"""One look for all progress bars: what, how far, how fast, how long still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

#: Progress and log share one console, so that log lines do not tear the bars.
console = Console(stderr=True)


class _RateColumn(ProgressColumn):
    """``unit``/s, or ns/day where the task says how many ns one item is."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        ns_per_item = task.fields.get("ns_per_item")
        if ns_per_item:
            return Text(f"{speed * ns_per_item * 86400:.0f} ns/day")
        return Text(f"{speed:.0f} {task.fields['unit']}/s")


@contextmanager
def track(
    what: str, total: int, unit: str, *, done: int = 0, show: bool = True, ns_per_item: float | None = None
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; yields a function to call with the number of items just finished (thread-safe).

    Parameters
    ----------
    what : the description
    total : number of items
    unit : what an item is, plural
    done : items finished before, by a run that was stopped
    show : False shows nothing
    ns_per_item : simulated time of an item in ns; the speed is then shown in ns/day
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not show,
    )
    with progress:
        task = progress.add_task(what, total=total, completed=done, unit=unit, ns_per_item=ns_per_item)
        yield lambda n: progress.advance(task, n)
