"""The page of a report: one file of HTML that needs nothing beside it, and the document as JSON."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from protocols.errors import InputError
from securemtk.report.document import KIND
from securemtk.report.pictures import draw_attacks, draw_leaks, draw_states
from securemtk.support.files import check_file, whole_file

TEMPLATE = "page.html.j2"
PAGE, SUFFIX = "report.html", ".html"


def check_target(page: Path) -> Path:
    """Return where the JSON of a page goes: beside it.

    Raises:
        InputError: the page is not to be an .html file, as `securemtk.support.files.check_file` for it or its JSON, or
            a file that is no report of ours stands in the place of its JSON.
        OSError: the folder takes no new file.
    """
    beside = page.with_suffix(".json")
    if page.suffix != SUFFIX:
        raise InputError(f"a report must be a {SUFFIX} file; got {str(page)!r}")
    for file in (page, beside):
        check_file(file, "a report")
    if beside.exists() and not _is_report(beside):
        raise InputError(f"a report's JSON must not replace another file; {str(beside)!r} is none of a report")
    return beside


def write_report(document: Mapping[str, Any], page: Path) -> None:
    """Write a report's page, and its JSON beside it; none of them unless both are whole.

    Args:
        document: from `measure_report`.
        page: the .html file; an older report there is replaced.

    Raises:
        InputError: as `check_target`.
        OSError: the disk refuses.
    """
    beside = check_target(page)
    html, text = render(document).encode(), (json.dumps(document, indent=1) + "\n").encode()
    with whole_file(page) as first, whole_file(beside) as second:
        first.write(html)
        second.write(text)


def render(document: Mapping[str, Any]) -> str:
    """Return the page of a document: HTML with all pictures inside, without scripts, and nothing to load.

    Every text of the document is escaped. Each number stands in a <data> element whose value is that of the document.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "setting": _setting}
    return environment.get_template(TEMPLATE).render(d=document, pictures=_pictures(document))


def check_drawing(attacks: Mapping[str, Any]) -> None:
    """Raise InputError where findings of attacks cannot be drawn."""
    try:
        draw_attacks(attacks["findings"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise InputError("findings of attacks must be as securemtk attack writes them; got others") from None


def _pictures(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the pictures as addresses that hold them."""
    matrix, attacks = document["leaks"]["matrix"], document["attacks"]
    pictures = {"states": _address("svg+xml", draw_states(document["accuracy"]))}
    if document["leaks"]["answers"]:
        picture = draw_leaks(matrix["gains"], matrix["rows"], matrix["columns"])
        pictures["leaks"] = _address("svg+xml", picture)
    if attacks is not None:
        pictures["attacks"] = _address("png", draw_attacks(attacks["findings"]))
    return pictures


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


_FORMATS = {
    "percent": lambda value: f"{100 * value:.1f}",
    "points": lambda value: f"{100 * value:+.1f}",
    "count": lambda value: f"{value:,}",
    "short": lambda value: f"{value:.3g}",
    "probability": lambda value: f"{value:.2f}",
    "ms": lambda value: f"{1e3 * value:.3g}" if value < 1 else f"{1e3 * value:,.0f}",
    "megabytes": lambda value: f"{value / 1e6:.3g}" if value < 1e9 else f"{value / 1e6:,.0f}",
}


def _number(value: float | None, form: str) -> Markup:
    """Return a number as a person reads it, with its value for machines; a dash where there is none."""
    if value is None:
        return Markup("&ndash;")
    return Markup('<data value="{}">{}</data>').format(value, _FORMATS[form](value))


def _setting(value: Any) -> str:
    """Return a setting as text."""
    return value if isinstance(value, str) else json.dumps(value)


def _is_report(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text())["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
