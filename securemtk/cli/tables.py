"""What commands print on stdout: one JSON document, or tables.

What a model or a file calls things is never markup, and does not steer the terminal.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

SHOWN_ROWS = 10
_NUMERALS = ("", *"-.0123456789")


def emit(as_json: bool, document: Mapping[str, Any], show: Callable[[], None]) -> None:
    """Print a document as JSON, or let `show` print it for people."""
    if as_json:
        print(json.dumps(document))
    else:
        show()


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show on stderr what is being done, while the block runs, where that is a terminal."""
    with Console(stderr=True).status(text):
        yield


def rows_table(title: str, rows: Sequence[Mapping[str, Any]], last: Mapping[str, Any] | None = None) -> None:
    """Print rows of one form, numbers to the right; a last one is set apart."""
    if not rows:
        return
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name in rows[0]:
        is_number = all(str(row[name])[:1] in _NUMERALS for row in rows) and any(row[name] for row in rows)
        right = is_number and name != "shape"
        table.add_column(name, overflow="fold", justify="right" if right else "left", no_wrap=right)
    for row in rows:
        table.add_row(*(shown(str(value)) for value in row.values()))
    if last is not None:
        table.add_section()
        table.add_row(*(shown(str(value)) for value in last.values()))
    Console().print(table)


def shown(text: str) -> Text:
    """Return a text as it is: what a model calls its nodes must neither be markup nor steer the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


def facts_table(title: str, facts: Mapping[str, Any]) -> None:
    """Print names and values, a line each."""
    rows_table(title, [{"": name, "value": value} for name, value in facts.items()])


def plain(text: str) -> None:
    """Print a text as it is."""
    print(text)


def say(text: str) -> None:
    """Print a line that may be long."""
    Console().print(text, highlight=False, soft_wrap=True)


def percent(value: float) -> str:
    """Return a share as percent, without the sign."""
    return f"{100 * value:.1f}"


def accuracy_table(tasks: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print how often each task answers right: a column each of `columns`, figure -> title."""
    rows = [
        {"task": name, "": "secured" if task["secured"] else "open"}
        | {title: percent(task[column]) for column, title in columns.items()}
        for name, task in tasks.items()
    ]
    rows_table("right answers on the test part, %", rows)
