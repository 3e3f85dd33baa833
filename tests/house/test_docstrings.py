"""Whoever reads a public name finds what it is and what it takes: a docstring and complete types, everywhere."""

import ast
from collections.abc import Iterator

import pytest
from helpers import ROOT

PATHS = sorted(path for top in ("protocols", "securemtk") for path in (ROOT / top).rglob("*.py"))
# What those of a function that communicates say besides, in this order.
SECTIONS = ("Cost:", "Security:")

Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Named, bool]]:
    """Give the public functions, classes and methods of a file: name, node, and whether it is a method."""
    for inner in node.body:
        if isinstance(inner, Named) and not inner.name.startswith("_"):
            yield prefix + inner.name, inner, isinstance(node, ast.ClassDef)
            if isinstance(inner, ast.ClassDef):
                yield from public(inner, f"{prefix}{inner.name}.")


def decorators(node: Named) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def is_typed(node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> bool:
    """Return whether every argument but self and the result has a type."""
    a = node.args
    named = [*a.posonlyargs, *a.args][is_method and "staticmethod" not in decorators(node) :]
    others = [x for x in (*a.kwonlyargs, a.vararg, a.kwarg) if x is not None]
    return node.returns is not None and all(x.annotation is not None for x in (*named, *others))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_has_a_docstring_and_complete_types(path):
    tree = ast.parse(path.read_text())
    names = list(public(tree))
    silent = [name for name, node, _ in names if not ast.get_docstring(node)]
    # A property's setter is told by its getter, an overload by the function that it leads to.
    told = {name for name, node, _ in names if ast.get_docstring(node)}
    assert [name for name in silent if name not in told] == []
    assert ast.get_docstring(tree) or not tree.body
    functions = [(name, node, method) for name, node, method in names if not isinstance(node, ast.ClassDef)]
    assert [name for name, node, method in functions if not is_typed(node, method)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "protocols").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_protocol_of_declared_cost_says_what_it_costs_and_what_each_party_learns(path):
    tree = ast.parse(path.read_text())
    for name, node, _ in public(tree):
        if any(decorator.startswith("costs(") for decorator in decorators(node)):
            text = ast.get_docstring(node) or ""
            places = [text.find(section) for section in SECTIONS]
            assert -1 < places[0] < places[1], f"{name} must say {SECTIONS}"
            assert "Source:" in text or "Source:" in (ast.get_docstring(tree) or ""), name
