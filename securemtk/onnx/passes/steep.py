"""Functions of a product with a large number: of x a comparison decides far more than of 1,000,000 x.

What a number is multiplied by moves behind functions that keep such factors, and behind a maximum. Before a function
that stays as it is on both sides of some numbers (a sigmoid, a bound, a comparison's truth), x is put between bounds
beyond which the function stays as it is. The bounds are public, and say of the number only in which of three ranges
it lies; the number itself stays the keeper's.
"""

from dataclasses import replace

import numpy as np

from protocols.limits import FRAC_BITS
from protocols.program.program import Attribute
from securemtk.onnx.building.registry import Step
from securemtk.onnx.model.graph import unique
from securemtk.onnx.passes.formulas import line
from securemtk.onnx.passes.net import Net

# Below this a product is left to the range of comparisons. For numbers up to the first of each pair, x is put between
# bounds of the second: their product is 32 at least, and below 2**15 with what is added to it.
_LARGE = 2.0**10
_BOUNDS = ((2.0**19, 2.0**-5), (2.0**28, 2.0**-14), (2.0**30, 2.0**-16))
_UNIT = 2.0**-FRAC_BITS
# Beyond this a function must stay as it is.
_END = 16.0


def large_factors(net: Net) -> Net:
    """A product with a number of 1024 or more goes behind `Relu`, maxima and differences, and is bounded first where \
beyond the bounds nothing changes (before `Sigmoid`, `Tanh`, `Clip`, comparisons); wrong answers, where the product is \
more than comparisons decide."""
    makers = {step.output: step for step in net.steps}
    for i, step in enumerate(net.steps):
        made = _behind(step, net, makers) or _bounded(step, net, makers)
        if made:
            return large_factors(net.having([*net.steps[:i], *made, *net.steps[i + 1 :]]))
    return net


def _affine(name: str, source: str, output: str, like: Step, scale: float, shift: float) -> Step:
    form = (1,) * (len(like.shape) + 1)
    given = {"scale": scale} | ({"shift": shift} if shift else {})
    params = {role: np.full(form, number) for role, number in given.items()}
    return Step("affine", name, (source,), output, like.shape, params)


def _behind(step: Step, net: Net, makers: dict[str, Step]) -> list[Step]:
    """Return a step of x, and the large factor behind it; nothing where that is not the same."""
    lines = [line(x, makers) for x in step.inputs]
    if not lines or any(scale < _LARGE for _, scale, _ in lines) or len({x[1:] for x in lines}) > 1:
        return []
    _, scale, shift = lines[0]
    if step.op in ("relu", "leaky_relu"):
        fits = not shift
    elif step.op == "max_pool2d":
        fits = not any(step.ints("pads"))
    else:
        fits = step.op in ("max", "argmax") or (step.op == "sub" and len(lines) == 2)
    if not fits:
        return []
    sources = tuple(source for source, _, _ in lines)
    if step.op == "argmax":
        return [replace(step, inputs=sources)]
    inner = unique(f"{step.output}/of less", {*net.shapes()})
    last = _affine(step.name, inner, step.output, step, scale, 0.0 if step.op == "sub" else shift)
    return [replace(step, inputs=sources, output=inner), last]


def _bounded(step: Step, net: Net, makers: dict[str, Step]) -> list[Step]:
    """Return a function of a large product with bounds before it; nothing where none are needed."""
    if not _has_ends(step):
        return []
    source, scale, shift = line(step.inputs[0], makers)
    bound = next((b for most, b in _BOUNDS if abs(scale) <= most), None)
    before = makers.get(source)
    if (
        abs(scale) < _LARGE
        or bound is None
        or (before is not None and before.op == "clip" and _is_between(before, bound))
    ):
        return []
    # a x + b = a (x + s) + r with s in fixed point.
    moved = round(shift / scale / _UNIT) * _UNIT
    rest, taken, steps = shift - scale * moved, {*net.shapes()}, list[Step]()
    shape = net.shapes()[source]
    if moved:
        output = unique(f"{step.output}/moved", taken)
        params = {"shift": np.full((1,) * (len(shape) + 1), moved)}
        steps.append(Step("affine", step.name, (source,), output, shape, params))
        source = output
    kept = unique(f"{step.output}/kept", taken)
    attrs: dict[str, Attribute] = {"low": -bound, "high": bound}
    steps.append(Step("clip", step.name, (source,), kept, shape, attrs=attrs))
    product = unique(f"{step.output}/product", taken)
    steps.append(_affine(step.name, kept, product, steps[-1], scale, rest))
    return [*steps, replace(step, inputs=(product,))]


def _is_between(step: Step | None, bound: float) -> bool:
    if step is None or step.op != "clip":
        return False
    return -bound <= step.number("low") and step.number("high") <= bound


def _has_ends(step: Step) -> bool:
    """Return whether a function stays as it is below -`_END` and above `_END`."""
    if step.op in ("sigmoid", "tanh", "erf"):
        return True
    if step.op == "clip":
        return max(abs(step.number("low")), abs(step.number("high"))) <= _END
    if step.op == "indicator":
        return all(abs(int(k)) <= _END / _UNIT for k in step.ints("knots"))
    if step.op != "function":
        return False
    if step.attrs["name"] == "exp_of_differences":
        # Of numbers that are 0 at most.
        return True
    if step.attrs["name"] != "straight":
        return False
    numbers = [step.number(f"n{i}") for i in range(len(step.attrs) - 1)]
    m = (len(numbers) - 2) // 3
    return max(map(abs, numbers[:m]), default=0.0) <= _END and not numbers[m + 1] and not numbers[-1]
