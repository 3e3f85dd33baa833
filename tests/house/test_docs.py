"""What docstrings, comments and pages refer to is there: sources, tags, paths, headings, declared costs."""

import ast
import importlib
import inspect
import io
import math
import pkgutil
import re
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import protocols

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.cfg").is_file())
REFERENCES = ROOT / "docs" / "references.md"
PROOFS = ROOT / "docs" / "protocols.md"
FOLDERS = ("protocols", "securemtk", "benchmarks", "tests", "examples", "docs", "findings")

# A tag is a capital, letters, then digits: not [0, 1], list[int], [R] or another letter of mathematics.
TAG = re.compile(r"(?<![\w\])`])\[([A-Z][A-Za-z]+[0-9][0-9A-Z-]*[a-z]?)\](?!\()")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A path from the root of the repository, with an anchor or without.
FROM_ROOT = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)(?:#([\w-]+))?(?![\w/*{{<])")
# The end of a path to a module or page, such as "test_docs.py" or "docs/protocols.md".
FILE = re.compile(r"(?<![\w./{*<-])((?:[\w-]+/)*[\w-]+\.(?:py|md|j2))\b(?![\w/(])")
# What only those who were there can read; the parts keep this file from speaking of it.
ABSENT = re.compile(r"\bissue \d|\b(?:the|this|our|each) issue\b|\bissue's\b|_issues?_|\bsha" + "red/|the dig" + "est")
# Names that stand for a file in a sentence.
STAND_INS = {"test_x.py", "findings/NAME.sh"}

# --- what there is ----------------------------------------------------------------------------------------------------


@cache
def files() -> tuple[str, ...]:
    """Return the files of the repository, as paths from its root."""
    found = [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    return tuple(
        path.relative_to(ROOT).as_posix() for path in found if path.is_file() and "__pycache__" not in path.parts
    )


def pages() -> list[Path]:
    """Return the pages that a reader is sent to, the history of changes included."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def modules(*folders: str) -> list[Path]:
    """Return all modules of these folders."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", without_code(page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(next(s for i in range(99) if (s := f"{slug}-{i}" if i else slug) not in found))
    return found


def without_code(text: str) -> str:
    """Return a page without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)


def references() -> set[str]:
    """Return the tags that the list of references explains."""
    return set(re.findall(r"^\| \[([^\]]+)\] \|", REFERENCES.read_text(), re.MULTILINE))


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Give name and docstring of a module, its classes and functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "the module"), text


def comments(path: Path) -> Iterator[tuple[str, str]]:
    """Give line and text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield f"line {token.start[0]}", token.string


def words(path: Path) -> Iterator[tuple[str, str]]:
    """Give what a module says to its reader: docstrings and comments."""
    yield from docstrings(path)
    yield from comments(path)


def sources(text: str) -> list[str]:
    """Return the paragraphs of a docstring that begin with "Source:", or follow it on a line."""
    found = []
    for match in re.finditer(r"\bSources?: ", text):
        paragraph = text[match.start() :].split("\n\n")[0]
        # The next section of the docstring is none of it.
        found.append(re.split(r"\n\s*[A-Z][a-z]+:(?: |\n)", paragraph)[0])
    return found


def where(path: Path, place: str) -> str:
    return f"{path.relative_to(ROOT)}, {place}"


def is_missing(name: str, anchor: str | None) -> bool:
    """Return whether a path from the root, or its heading, is absent.

    A decision may be named by its number, what is in a module by a dot behind its path.
    """
    target = ROOT / name
    if target.exists():
        return bool(anchor) and anchor not in anchors(target)
    by_number = list(target.parent.glob(f"{target.name}-*.md"))
    return not by_number and not (ROOT / f"{name.rpartition('.')[0]}.py").exists()


def absent_paths(text: str) -> list[str]:
    """Return the paths of a text at whose end nothing is."""
    absent = [name for name, anchor in FROM_ROOT.findall(text) if is_missing(name, anchor)]
    absent += [name for name in FILE.findall(text) if name not in endings()]
    return [name for name in absent if name not in STAND_INS]


@cache
def endings() -> frozenset[str]:
    """Return every end of a path of the repository."""
    parts = [name.split("/") for name in files()]
    return frozenset("/".join(each[i:]) for each in parts for i in range(len(each)))


# --- what is said of it -----------------------------------------------------------------------------------------------

CODE = ("protocols", "securemtk", "benchmarks", "tests", "examples")


def test_every_source_of_a_docstring_names_a_reference_or_a_page():
    bare = [
        (where(path, name), source)
        for path in modules("protocols", "securemtk")
        for name, text in docstrings(path)
        for source in sources(text)
        if not (TAG.search(source) or FROM_ROOT.search(source))
    ]
    assert not bare


def test_every_protocol_with_a_cost_says_why_it_is_secure_and_where_it_is_from():
    for name, (function, _) in declared().items():
        text, module = inspect.getdoc(function) or "", inspect.getdoc(inspect.getmodule(function)) or ""
        assert "Cost:" in text, name
        assert "Security:" in text, name
        assert "Source:" in text or "Source:" in module, name


def test_every_tag_is_in_the_list_of_references():
    said = [(where(path, place), text) for path in modules(*CODE) for place, text in words(path)]
    said += [(page.name, without_code(page.read_text())) for page in pages()]
    known = references()
    assert not [(place, tag) for place, text in said for tag in TAG.findall(text) if tag not in known]


def test_the_list_of_references_has_each_tag_once_and_rows_of_three():
    rows = [line for line in REFERENCES.read_text().splitlines() if line.startswith("| [")]
    assert len(rows) == len(references())
    assert all(row.count(" | ") == 2 for row in rows)


def test_every_path_in_a_docstring_or_comment_is_there():
    said = [(where(path, place), text) for path in modules(*CODE) for place, text in words(path)]
    assert not [(place, name) for place, text in said for name in absent_paths(text)]


def test_every_page_that_a_message_names_is_there():
    absent = [
        (where(path, f"line {node.lineno}"), name)
        for path in modules("protocols", "securemtk")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name, anchor in re.findall(r"\b(docs/[\w./-]+\.md)(?:#([\w-]+))?", node.value)
        if is_missing(name, anchor)
    ]
    assert not absent


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_path_of_a_page_leads_somewhere(page):
    text = without_code(page.read_text())
    broken = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        target, _, anchor = link.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            broken.append(link)
    if page.name != "CHANGELOG.md":  # It names files as they were.
        broken += absent_paths(re.sub(r"\]\([^)]*\)", "]", text))
    assert not broken


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_nothing_speaks_of_what_a_reader_does_not_have(folder):
    found = []
    for name in files():
        path = ROOT / name
        inside = path.parent == ROOT if folder == "." else name.startswith(f"{folder}/")
        if inside and path.name != "CHANGELOG.md" and path.suffix in (".py", ".md", ".j2", ".cfg", ".toml", ".sh"):
            lines = enumerate(path.read_text().splitlines(), 1)
            found += [f"{name}:{number}: {line.strip()}" for number, line in lines if ABSENT.search(line)]
    assert not found


# --- what the page of proofs says of costs ----------------------------------------------------------------------------


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading or a line of the page of proofs."""
    text = PROOFS.read_text().partition(heading)[2]
    table = re.search(r"^\|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]


def ours(name: str = "protocols") -> Iterator[Any]:
    """Give the modules of the package, wherever they lie in it."""
    for info in pkgutil.walk_packages(protocols.__path__, f"{name}."):
        yield importlib.import_module(info.name)


def declared() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return qualified name -> function and declared cost of every protocol that has one."""
    found: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
    for module in ours():
        held = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        methods = [value for kind in held if inspect.isclass(kind) for value in vars(kind).values()]
        for function in (*held, *methods):
            cost = getattr(function, "cost", None)
            if inspect.isfunction(function) and cost is not None:
                assert function.__qualname__ not in found, "two protocols of one name: the table needs more than names"
                found[function.__qualname__] = function, cost
    return found


def value_of(formula: str, **names: Any) -> Any:
    return eval(formula.strip("`"), {"__builtins__": {}}, {"ceil": math.ceil, **names})  # noqa: S307


def test_the_declared_costs_are_those_of_the_page():
    rows = {row[0].strip("`"): row for row in rows_of("## Declared costs")}
    costs = declared()
    assert set(rows) == set(costs)
    for name, (_, cost) in costs.items():
        for start in (1, 8, 1003):
            names = {each: start + 7 * i for i, each in enumerate(inspect.signature(cost).parameters)}
            found = cost(**names)
            assert (found.rounds, found.payload_bytes) == (int(rows[name][1]), value_of(rows[name][2], **names)), name


def one(attribute: str) -> Any:
    """Return what some module of the package defines under a name."""
    return next(value for module in ours() if (value := getattr(module, attribute, None)) is not None)


# The start of a row's first cell -> shapes, options and the letters of its formulas.
SAMPLES: dict[str, tuple[str, tuple[tuple[int, ...], ...], dict[str, Any], dict[str, int]]] = {
    "`linear`": ("linear", ((3, 5), (3, 7)), {"op": "matmul", "weight": "w"}, {"M": 21}),
    "`reused`": ("reused", ((3, 5), (3, 7), (5, 7)), {"weight": "0", "op": "matmul"}, {"M": 21}),
    "`triple`": ("triple", ((3, 5), (5, 7)), {"op": "matmul"}, {"M": 21}),
    "`square`": ("square", ((11,),), {}, {}),
    "`and`": ("and", ((11,), (11,)), {}, {"M": 11}),
    "`bit`": ("bit", ((11,),), {}, {}),
    "`truncation`, b to 32": ("truncation", ((11,),), {"bits": 32}, {}),
    "`truncation`, b above": ("truncation", ((11,),), {"bits": 33}, {}),
    "`sign` with truncation": ("sign", ((11,),), {"bits": 22, "k": 32}, {"k": 32}),
    "`sign` without": ("sign", ((11,),), {"bits": 0, "k": 40}, {"k": 40}),
    "`pairs` with truncation": ("pairs", ((7, 5),), {"bits": 16, "k": 32}, {"k": 32, "p": 15, "o": 5}),
    "`pairs` without": ("pairs", ((7, 5),), {"bits": 0, "k": 20}, {"k": 20, "p": 15}),
    "`spline`": ("spline", ((11,),), {"knots": 3, "degree": 2, "k": 32}, {"k": 32, "K": 3, "d": 2}),
    "`key_gate`": ("key_gate", ((4, 10),), {}, {"S": 10}),
    "`output_gate`": ("output_gate", ((4, 10),), {"bits": 16, "task": "t"}, {"B": 4}),
}


@pytest.mark.parametrize("start", SAMPLES)
def test_the_corrections_of_a_kind_are_as_long_as_the_page_says(start):
    kind, shapes, options, letters = SAMPLES[start]
    (row,) = [row for row in rows_of("**Cost.** Corrections of each kind") if row[0].startswith(start)]
    request = one("Request")(kind, shapes, tuple(options.items()))
    keeper, user = (8 * sum(map(math.prod, one("correction_shapes")(request, rank))) for rank in (0, 1))
    names = {"N": math.prod(shapes[0]), "key": lambda n, k: 8 * math.ceil(n / 8) * (16 * (k - 7) + 4), **letters}
    assert (keeper - user, user) == (value_of(row[2], **names), value_of(row[3], **names))


def test_the_page_has_a_row_for_every_kind_of_correlation():
    kinds = {row[0].split("`")[1] for row in rows_of("**Cost.** Corrections of each kind")}
    assert kinds == set(one("KINDS")) == {kind for kind, *_ in SAMPLES.values()}
