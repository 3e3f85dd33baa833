"""How much of its room each layer takes on sample data: where fixed point would give a wrong answer, and no sign of it.

Each step of a protocol is right only for values below a bound:

- a comparison for |t| < 2**(k-1) at scale 2**f, where t is what is compared: the value itself at a ReLU, its distance
  from a knot at a piecewise function, the difference of two values at a maximum; padding of a maximum is a value
  itself, which no other may come near;
- a truncation for |z| < 2**62 at its scale: that is for each result that has more than f fraction bits, which those
  of products and piecewise functions have, and what is made of them by sums, means and public factors.

The values are those of a run in float64 in the clear: whoever holds the weights and the data may ask.
"""

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocols import limits
from protocols.errors import RangeError, UnsupportedError
from protocols.primitives import ring
from protocols.program import plain
from protocols.program.program import Layer, Program
from protocols.running import runner
from protocols.running.runner import Plan
from protocols.two_party.operators import pieces_of, wide_pieces_of

COMPARED, PADDING = limits.WIDEST, limits.input_limit()

STEPS = ("comparison", "truncation")
# More room than this is not told apart: manifests are public, and this says enough.
MOST_HEADROOM = 8
# Values of all layers that are held at a time, 8 bytes each.
_CHUNK_ELEMENTS = 1 << 24
_PRODUCTS = ("conv2d", "matmul", "affine", "mul", "dot", "scale", "mean", "avg_pool2d")
_SUMS = ("add", "sub", "shift", "sum", "deviation", "sum_pool2d")

Headroom = Mapping[str, Mapping[str, int]]
Arrays = Mapping[str, NDArray[np.floating]]
# A step, the largest value that came to it, and its bound.
_Load = tuple[str, float, float]


@dataclass(frozen=True)
class LayerRange:
    """The step of a layer that sample data brought nearest to its bound.

    Args:
        name: the layer's name.
        op: its operator.
        step: a name of `STEPS`.
        largest: greatest magnitude that came to this step.
        bound: the step is right for magnitudes below it.
    """

    name: str
    op: str
    step: str
    largest: float
    bound: float

    @property
    def share(self) -> float:
        """Return largest / bound; from 1 on, answers are wrong."""
        return self.largest / self.bound

    @property
    def headroom(self) -> int:
        """Return how many times the values may double and stay below the bound: less than 0 beyond it."""
        return min(MOST_HEADROOM, -math.frexp(self.share)[1]) if self.share else MOST_HEADROOM


def measure(
    program: Program, params: Arrays, batches: Iterable[Arrays], comparison_bits: int = limits.COMPARISON_BITS
) -> tuple[LayerRange, ...]:
    """Run a network in the clear and tell how near each layer comes to the bounds of `protocol="fss"`.

    Args:
        program: the network.
        params: name -> float array.
        batches: each input name -> float array (n, *sample), finite.
        comparison_bits: bits on which values are compared, as in `Config`.

    Returns:
        An entry for each layer with a bound of its own, in the program's order. Layers that only move values have
        none, nor have sums of values that need no truncation: what they make is measured where it is used.

    Cost: a forward pass in float64; memory is the parameters in float64, and the values of one sample or 128 MiB.
    """
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
    scales = runner.scales(Plan(program, "fss", 1, False))
    most: dict[str, LayerRange] = {}
    for part in (part for batch in batches for part in plain.parts(program, batch, _CHUNK_ELEMENTS)):
        values = {name: torch.from_numpy(value) for name, value in plain.run(program, weights, part).items()}
        for layer in program.layers:
            inputs, output = [values[x] for x in layer.inputs], values[layer.output]
            for step, largest, bound in _loads(layer, scales[layer.name], inputs, output):
                wider = comparison_bits - limits.COMPARISON_BITS if step == "comparison" else 0
                if layer.op == "wide_spline" and wider < 0:
                    largest = max(largest, COMPARED)  # such a function is not made for fewer bits, whatever the values
                found = LayerRange(layer.name, layer.op, step, largest, bound * 2.0**wider)
                if layer.name not in most or found.share > most[layer.name].share:
                    most[layer.name] = found
    return tuple(most.values())


def headroom(rows: Iterable[LayerRange]) -> dict[str, dict[str, int]]:
    """Return step -> layer -> headroom: what may be told to everybody."""
    room: dict[str, dict[str, int]] = {}
    for row in rows:
        room.setdefault(row.step, {})[row.name] = row.headroom
    return room


def require(room: Headroom, steps: Collection[str] = STEPS, comparison_bits: int = limits.COMPARISON_BITS) -> None:
    """Raise RangeError, with the names of the layers, where values reach the bound of one of `steps`."""
    if beyond := _layers(room, steps, -1, comparison_bits):
        raise RangeError(
            f"values must stay within the bounds of fixed point; on sample data those of {beyond} do not, and answers"
            " would be wrong: scale the model or its input down"
        )


def require_width(program: Program, protocol: str, comparison_bits: int) -> None:
    """Raise UnsupportedError, with the layers' names, where `comparison_bits` are too few for a function's knots.

    Args:
        program: the network.
        protocol: "fss" or "crypten", whose comparisons take all 64 bits.
        comparison_bits: as in `Party`.
    """
    fewest = {
        layer.name: (pieces_of(layer) if layer.op == "spline" else wide_pieces_of(layer)).fewest_bits
        for layer in program.layers
        if layer.op in ("spline", "wide_spline")
    }
    beyond = [name for name, bits in fewest.items() if bits > comparison_bits]
    if beyond and protocol == "fss":
        most = max(fewest.values())
        raise UnsupportedError(
            f"comparison_bits must be {most} or more for the functions {', '.join(map(repr, beyond))}; "
            f"got {comparison_bits}"
        )


def warning(room: Headroom, steps: Collection[str] = STEPS, comparison_bits: int = limits.COMPARISON_BITS) -> str:
    """Return a text that names the layers whose values reach half of the bound of one of `steps`; "" for none."""
    close = _layers(room, steps, 0, comparison_bits)
    return f"on sample data the values of {close} reach half of what fixed point holds" if close else ""


def steps_of(protocol: str) -> tuple[str, ...]:
    """Return the steps of a protocol that have the bounds of this module: CrypTen's comparisons take 64 bits."""
    return STEPS if protocol == "fss" else STEPS[1:]


def _layers(room: Headroom, steps: Collection[str], most: int, comparison_bits: int) -> str:
    wider = {"comparison": comparison_bits - limits.COMPARISON_BITS}
    found = [
        (name, step) for step in steps for name, bits in room.get(step, {}).items() if bits + wider.get(step, 0) <= most
    ]
    return ", ".join(f"{name!r} ({step})" for name, step in found)


def _loads(layer: Layer, frac_bits: int, inputs: list[Tensor], output: Tensor) -> Iterator[_Load]:
    """Give the steps of a layer's protocol with what comes to them; its result has `frac_bits` fraction bits."""
    if layer.op in _PRODUCTS + _SUMS:
        if frac_bits > limits.FRAC_BITS:
            yield "truncation", _largest(output), 2.0 ** (limits.LIMIT_BITS - frac_bits)
    elif layer.op == "relu":
        yield "comparison", _largest(inputs[0]), COMPARED
    elif layer.op == "spline":
        yield from _spline_loads(layer, inputs[0], output)
    elif layer.op == "wide_spline":
        yield "comparison", _of_room(layer, inputs[0]), COMPARED
    elif layer.op == "max_pool2d":
        yield from _pool_loads(layer, inputs[0])
    elif layer.op in ("max", "argmax"):
        yield from _tree_loads(inputs[0].movedim(int(layer.number("axis")), 0), neighbours=layer.op == "argmax")


def _spline_loads(layer: Layer, x: Tensor, output: Tensor) -> Iterator[_Load]:
    """Give what `spline.evaluate` compares, and what is truncated behind it."""
    yield "comparison", _from_knots(layer, x), COMPARED
    if layer.number("frac_bits") > layer.number("keep_bits"):
        yield "truncation", _largest(output), 2.0 ** (limits.LIMIT_BITS - layer.number("frac_bits"))


def _from_knots(layer: Layer, x: Tensor) -> float:
    """Return the largest distance of a value from a knot."""
    knots = torch.tensor([min(layer.ints("knots")), max(layer.ints("knots"))]).double() * 2.0**-limits.FRAC_BITS
    return max(_largest(x - knot) for knot in knots)


def _of_room(layer: Layer, x: Tensor) -> float:
    """Return the largest value, as a share of what its sign has between the knots and the bound, times the bound.

    A function of positive numbers has knots up to where negative ones are hardly decided any more: the distance from
    its last knot says nothing of how near a value is to being too large.
    """
    low, high = (k(layer.ints("knots")) * 2.0**-limits.FRAC_BITS for k in (min, max))
    above, below = _largest(x.clamp(min=0.0)), _largest(x.clamp(max=0.0))
    return COMPARED * max(above / (COMPARED + low), below / (COMPARED - high))


def _pool_loads(layer: Layer, x: Tensor) -> Iterator[_Load]:
    """Give what a maximum over windows compares."""
    if any(layer.ints("pads")):
        yield "comparison", _largest(x), PADDING
    # Differences from padding are accounted for by the line above.
    yield from _tree_loads(ring.windows(plain.pad(x, layer, math.nan), layer.ints("kernel"), layer.ints("stride")))


def _tree_loads(columns: Tensor, *, neighbours: bool = False) -> Iterator[_Load]:
    """Give what a tree of maxima along the first axis compares: the differences of its pairs."""
    largest = 0.0
    while len(columns) > 1:
        half = len(columns) // 2
        rest = columns[2 * half :]
        a, b = (columns[i : 2 * half : 2] if neighbours else columns[i * half : (i + 1) * half] for i in (0, 1))
        largest = max(largest, _largest((a - b).nan_to_num(nan=0.0)))
        columns = torch.cat([torch.fmax(a, b), rest])
    yield "comparison", largest, COMPARED


def _largest(x: Tensor) -> float:
    """Return the greatest magnitude, finite also where float64 has overflown."""
    largest = float(x.abs().max())
    return largest if math.isfinite(largest) else sys.float_info.max
