"""What each protocol costs, from the costs that the functions declare and that the tests compare with the wire.

    python -m benchmarks.costs > docs/costs.md

No measurement: rounds, bytes for sample sizes, the docstring's own words, and the key material of a comparison.
"""

import argparse
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

import protocols
from benchmarks.report import table
from protocols.cost import Cost
from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, USER, Request
from protocols.limits import COMPARISON_BITS
from protocols.program.program import Attribute, Layer, Program
from protocols.running import runner
from protocols.running.runner import Plan

SIZES = (8, 1_000, 1_000_000)
# How the arguments of a declared cost follow from the number n of elements; a sigmoid has 21 knots.
ARGUMENTS: dict[str, Callable[[int], int]] = {
    "n": lambda n: n,
    "pairs": lambda n: n // 2,
    "knots": lambda n: 21,
    "bits": lambda n: 21 * n,
}
# Comparisons in each sample program below; a multiple of what keys come in.
N_RELU, POOL_SIDE = 1024, 64

HEAD = """# What each protocol costs

Printed by `python -m benchmarks.costs`, from what the functions declare (`protocols/cost.py`); the tests compare that
with what really crosses the wire. Change it there, then `python -m benchmarks.costs > docs/costs.md`.

Bytes are those of tensors, both directions together, without frame headers and TLS records. A round is a message, or a
simultaneous exchange, that has to wait for the one before. n is the number of elements that go in; a
piecewise function has 21 knots here, as many as a sigmoid.
"""

KEYS_HEAD = f"""
## Key material of a comparison

What the dealer sends for each comparison of {COMPARISON_BITS} bits before the prediction, in bytes; what the parties
expand from their seeds costs nothing. Shares that serve the truncation of the same values are included.
"""


def declared() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Cost]]]:
    """Give name, function and cost of everything in `protocols` that declares one."""
    for info in pkgutil.walk_packages(protocols.__path__, "protocols."):
        module = importlib.import_module(info.name)
        for name, function in vars(module).items():
            cost = getattr(function, "cost", None)
            if inspect.isfunction(function) and function.__module__ == module.__name__ and cost is not None:
                yield f"{info.name.rpartition('.')[2]}.{name}", function, cost


def cost_for(cost: Callable[..., Cost], n: int) -> Cost:
    """Return a declared cost for n elements."""
    return cost(**{name: ARGUMENTS[name](n) for name in inspect.signature(cost).parameters})


def words(function: Callable[..., Any]) -> str:
    """Return the cost as the docstring says it: its section "Cost", in one line."""
    first, *rest = (inspect.getdoc(function) or "").partition("\nCost:")[2].splitlines()
    indented = takewhile(lambda line: line.startswith(" "), rest)
    return " ".join(line.strip() for line in (first, *indented))


def protocols_table() -> str:
    """Return the Markdown table of all declared costs."""
    rows = []
    for name, function, cost in declared():
        of_sizes = [cost_for(cost, n) for n in SIZES]
        rows.append(
            [f"`{name}`", str(of_sizes[-1].rounds), *(f"{c.payload_bytes:,}" for c in of_sizes), words(function)]
        )
    return table(["protocol", "rounds", *(f"bytes, n = {n:,}" for n in SIZES), "in words"], rows)


# --- key material ---------------------------------------------------------------------------------------------------


def _matmul(n: int) -> Layer:
    return Layer("matmul", "fc", ("x",), "y", (n,), {"weight": "w", "bias": "b"})


def _conv(side: int) -> Layer:
    attrs: dict[str, Attribute] = {"stride": (1, 1), "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
    return Layer("conv2d", "conv", ("x",), "y", (1, side, side), {"weight": "w", "bias": "b"}, attrs)


def _key_requests(program: Program) -> list[Request]:
    """Return the requests of one prediction for which both parties get keys."""
    listed = runner.requests(Plan(program, "fss", 1, False))
    return [q for q in listed if correlation.KINDS[q.kind].to_both(q)]


def _bytes_each(request: Request, comparisons: int) -> dict[str, float]:
    """Return what each party receives for a request, by comparison; corrections are 8-byte words."""
    shapes = {role: correlation.correction_shapes(request, rank) for role, rank in (("keeper", KEEPER), ("user", USER))}
    return {role: 8 * sum(map(math.prod, listed)) / comparisons for role, listed in shapes.items()}


def key_bytes() -> dict[str, dict[str, float]]:
    """Return the bytes that each party receives from the dealer for one comparison, by where it occurs."""
    relu = Program(
        {"x": (8,)},
        ("z",),
        (_matmul(N_RELU), Layer("relu", "relu", ("y",), "z", (N_RELU,))),
        {"w": (8, N_RELU), "b": (N_RELU,)},
    )
    half = POOL_SIDE // 2
    attrs: dict[str, Attribute] = {"kernel": (2, 2), "stride": (2, 2), "pads": (0, 0, 0, 0)}
    pool = Program(
        {"x": (1, POOL_SIDE, POOL_SIDE)},
        ("z",),
        (_conv(POOL_SIDE), Layer("max_pool2d", "pool", ("y",), "z", (1, half, half), {}, attrs)),
        {"w": (1, 1, 1, 1), "b": (1,)},
    )
    (of_relu,) = _key_requests(relu)
    first, second = _key_requests(pool)
    return {
        "ReLU with truncation": _bytes_each(of_relu, N_RELU),
        "max-pool 2x2 with truncation, first level": _bytes_each(first, POOL_SIDE**2 // 2),
        "max-pool 2x2, second level": _bytes_each(second, POOL_SIDE**2 // 4),
    }


def keys_table(keys: dict[str, dict[str, float]]) -> str:
    """Return the Markdown table of `key_bytes`."""
    rows = [[name, f"{received['keeper']:.0f}", f"{received['user']:.0f}"] for name, received in keys.items()]
    return table(["comparison", "to the keeper", "to the user"], rows)


def document() -> str:
    """Return the text of docs/costs.md."""
    return "\n".join([HEAD, protocols_table(), KEYS_HEAD, keys_table(key_bytes())])


def main() -> None:
    """Run from the command line."""
    argparse.ArgumentParser(prog="python -m benchmarks.costs", description=(__doc__ or "").splitlines()[0]).parse_args()
    print(document())


if __name__ == "__main__":
    main()
