"""How long work tells what it does, and the one bar that shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

Progress = Callable[[str, float], None]
"""Told what goes on, in a few words, and the share of all the work that is done, 0 to 1."""


def silent(_what: str, _done: float) -> None:
    """A progress callback that tells nobody."""


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """Return a callback for one part of some work: its 0 to 1 are `start` to `end` of the whole.

    Args:
        progress: of the whole.
        start, end: shares of the whole, 0 to 1.
    """
    return lambda what, done: progress(what, start + (end - start) * done)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Give a progress callback that draws a bar on stderr if that is a terminal; the bar goes when the block ends.

    Args:
        title: stands before the bar all the time; what the callback is told stands behind it.

    Example:
        >>> with progress_bar("count") as progress:
        ...     for number in range(3):
        ...         progress(f"number {number}", number / 3)
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
    line = bar.add_task(title, total=1.0, what="")

    def show(what: str, done: float) -> None:
        # Not before the first call: until then what the work needs, such as a data set, may draw a bar of its own.
        bar.start()
        bar.update(line, completed=done, what=what)

    try:
        yield show
    finally:
        bar.stop()
