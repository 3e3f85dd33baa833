"""How far each layer of an encrypted prediction is from float arithmetic on sample data: in the clear, beforehand.

A layer's own error is what it makes in fixed point of the values that came to it, against what float64 makes of the
same values, relative to the largest of them: so it is the layer's, and none of those before. All that fixed point can
do to an answer shows in it: values beyond a bound, constants and differences of a few units in the last place,
arguments outside a function's domain. What the encoding of an input loses is told of each of its features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from protocols import limits
from protocols.program import plain
from protocols.program.program import Layer, Program
from protocols.running import fixed

Arrays = Mapping[str, NDArray[np.floating]]
Exact = Callable[[NDArray[np.float64]], NDArray[np.float64]]
# From this share of the largest value on, an error is told.
MOST_ERROR = 0.01
# Values of all layers that are held at a time, 8 bytes each, twice.
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class LayerError:
    """A layer's own error on sample data.

    Args:
        name: the layer's name, or that of an input with the place of the feature.
        op: its operator; "input" for an input.
        error: greatest difference from float64 arithmetic on the same values.
        largest: greatest magnitude of the layer's right values.
    """

    name: str
    op: str
    error: float
    largest: float

    @property
    def share(self) -> float:
        """Return error / largest; 0 where there is nothing but zeros, and no error."""
        if self.error <= 0:
            return 0.0
        return min(self.error / self.largest, 1e9) if self.largest else 1e9


def measure(
    program: Program,
    params: Arrays,
    batches: Iterable[Arrays],
    exact: Mapping[str, Exact] | None = None,
    protocol: str = "fss",
    comparison_bits: int = limits.COMPARISON_BITS,
) -> tuple[tuple[LayerError, ...], dict[str, NDArray[np.float64]]]:
    """Run a network in fixed point and tell each layer's own error.

    Args:
        program: the network.
        params: name -> float array.
        batches: each input name -> float array (n, *sample), finite and within the range of inputs.
        exact: layer -> the function that it approximates; others are compared with what they are in float64.
        protocol, comparison_bits: as in `fixed.run`.

    Returns:
        An entry for each layer, and for each input the worst of its features; and output name -> float64 (n, ...), as
        an encrypted prediction answers, but for units in the last place.

    Cost: a pass in int64 and each operator once in float64; memory is the parameters twice, and the values of one
        sample or 128 MiB.
    """
    weights = {name: torch.as_tensor(np.asarray(value)).double() for name, value in params.items()}
    worst: dict[str, LayerError] = {}
    answers: dict[str, list[NDArray[np.float64]]] = {name: [] for name in program.outputs}
    for part in (part for batch in batches for part in plain.parts(program, batch, _CHUNK_ELEMENTS)):
        found = fixed.run(program, params, part, protocol, comparison_bits)
        rows = [*_inputs(part, found), *_layers(program, weights, found, exact or {})]
        for row in rows:
            before = worst.get(row.name)
            worst[row.name] = row if before is None else _joined(before, row)
        for name, values in answers.items():
            values.append(ring_scale(found[name]))
    return tuple(worst.values()), {name: np.concatenate(parts) for name, parts in answers.items()}


def ring_scale(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values as they are revealed, at 2**-16."""
    return np.floor(values * 2.0**limits.FRAC_BITS) * 2.0**-limits.FRAC_BITS


def _joined(a: LayerError, b: LayerError) -> LayerError:
    return LayerError(a.name, a.op, max(a.error, b.error), max(a.largest, b.largest))


def _inputs(given: Arrays, found: Arrays) -> Iterator[LayerError]:
    """Give what encoding takes from the features of each input, the places of its last axis."""
    for name, x in given.items():
        error = np.abs(np.asarray(x, np.float64) - found[name])
        axes = tuple(range(x.ndim - 1))
        for place, (e, size) in enumerate(zip(error.max(axes).ravel(), np.abs(x).max(axes).ravel(), strict=True)):
            if x.ndim > 1:
                yield LayerError(f"{name}[..., {place}]", "input", float(e), float(size))


def _layers(
    program: Program, weights: plain.Weights, found: Arrays, exact: Mapping[str, Exact]
) -> Iterator[LayerError]:
    for layer in program.layers:
        # An answer that is a place or a truth may hang on one unit, which is no error of the layer's.
        if layer.op == "argmax" or (layer.op == "spline" and not layer.number("frac_bits")):
            continue
        inputs = [found[name] for name in layer.inputs]
        with np.errstate(all="ignore"):
            wanted = _wanted(layer, weights, inputs, exact)
            error = np.abs(found[layer.output] - wanted)
        # Infinity is no number that any arithmetic has: what is not finite in float64 is an error of any size.
        largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
        error = np.where(np.isfinite(wanted), error, np.inf)
        yield LayerError(layer.name, layer.op, float(error.max(initial=0.0)), float(largest))


def _wanted(
    layer: Layer, weights: plain.Weights, inputs: list[NDArray[np.floating]], exact: Mapping[str, Exact]
) -> NDArray[np.float64]:
    if layer.name in exact:
        return np.asarray(exact[layer.name](np.asarray(inputs[0], np.float64)))
    made: torch.Tensor = plain.OPERATORS[layer.op](layer, weights, *(torch.as_tensor(x) for x in inputs))
    result: NDArray[np.float64] = made.numpy()
    return result
