"""Logarithms of probabilities, of powers of e and of what sums and products make of them: found without the number.

`Log(Sigmoid(x))`, `Log(Softmax(x))`, `Log(1 + Exp(x))` and the like pass through a number that is far smaller or larger
than fixed point holds, though their result is of x's size. The logarithm of such a number is made from the logarithms
of its parts instead: of e**x it is x, of a sigmoid x - softplus(x), of a product a sum, of a sum a log-sum-exp. So are
quotients of such numbers by their own sum, which are softmaxes, and quotients of sums of e**x and e**-x.

As in `formulas`, the single constants of a formula decide whether it is one. Those that stay are the keeper's still.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from protocols.program.program import Attribute, Shape
from securemtk.onnx.building.builder import Builder
from securemtk.onnx.building.lower import custom
from securemtk.onnx.building.registry import LIMIT, Step
from securemtk.onnx.model.graph import unique
from securemtk.onnx.passes.formulas import line, single_numbers
from securemtk.onnx.passes.net import Net

_RECIPROCALS = ("reciprocal", "reciprocal_positive")
_MOVES = ("reshape", "transpose", "expand", "take", "concat", "identity")
# 1 / (1 + e**-x) of float32 is 0 below the first, and 1 above the second.
_FLOAT_0, _FLOAT_1 = -88.7228, 16.6355
# onnxruntime's Sigmoid is 0 from here on.
_SIGMOID_0 = -18.0
# What keeps a sum from 0, and is less than float32's Sigmoid ever is.
_NOTHING = 1e-8


class _Maker(Builder):
    """New steps behind those of a net, and what is known of logarithms; a value that is not used in the end is dead.

    Args:
        net: as it is.
        last: the step whose result is to be made otherwise.
    """

    def __init__(self, net: Net, last: Step) -> None:
        shapes = net.shapes()
        taken = set(shapes)
        super().__init__(shapes, lambda op, n: last.name, lambda n: unique(f"{last.output}/log {n}", taken))
        self.makers = {step.output: step for step in net.steps}
        self._last = last
        self._known: dict[tuple[str, str], str | None] = {}

    # --- steps

    def add(self, op: str, inputs: Sequence[str], shape: Shape | None = None, /, **attrs: Attribute) -> str:
        """Add a step without parameters; the shape that inputs broadcast to, unless it is given."""
        shape = np.broadcast_shapes(*map(self.shape, inputs)) if shape is None else shape
        return self.put(op, inputs, shape, attrs=attrs)

    def line_of(self, value: str, scale: float, shift: float) -> str:
        """Add x * scale + shift; public where they are 1, -1 and 0, else the keeper's."""
        if abs(scale) == 1.0 and not shift:
            return value if scale == 1.0 else self.add("scale", (value,), factor=-1.0, offset=0.0)
        form = (1,) * (len(self.shape(value)) + 1)
        given = {"scale": scale} if scale != 1.0 else {}
        given |= {"shift": shift} if shift else {}
        params = {role: np.full(form, number) for role, number in given.items()}
        return self.put("affine", (value,), self.shape(value), params)

    def function(self, value: str, name: str, *numbers: float) -> str:
        """Add a function of `protocols.program.functions.CUSTOM`."""
        return self.add("function", (value,), **custom(name, *numbers))

    def reduced(self, op: str, value: str, axes: Sequence[int]) -> str:
        """Add a sum or maximum that keeps its axes with size 1."""
        shape = tuple(1 if i in axes else n for i, n in enumerate(self.shape(value), 1))
        if op == "sum":
            return self.add("sum", (value,), shape, axes=tuple(axes), keepdims=1)
        for axis in axes:
            part = tuple(1 if i == axis else n for i, n in enumerate(self.shape(value), 1))
            value = self.add("max", (value,), part, axis=axis)
        return value

    def moved(self, step: Step, values: Sequence[str]) -> str:
        """Repeat a step that only moves elements, of other values."""
        return self.put(step.op, values, step.shape, step.params, step.attrs)

    def line(self, value: str) -> tuple[str, float, float]:
        """Return x, a and b of a value a x + b with single numbers; of any other the value itself, 1 and 0."""
        return line(value, self.makers)

    def negative(self, value: str) -> str:
        """Return -x."""
        source, scale, shift = self.line(value)
        return source if (scale, shift) == (-1.0, 0.0) else self.line_of(value, -1.0, 0.0)

    # --- logarithms

    def log(self, value: str) -> str | None:
        """Return the logarithm of a value that is positive by its form, None for any other."""
        return self._asked("log", value, self._log)

    def log_of_rest(self, value: str) -> str | None:
        """Return the logarithm of 1 - x for a value that is below 1 by its form."""
        return self._asked("rest", value, self._log_of_rest)

    def logit(self, value: str) -> str | None:
        """Return log(x / (1 - x)) where it can be made without x."""
        return self._asked("logit", value, self._logit)

    def _asked(self, what: str, value: str, ask: Callable[[Step], str | None]) -> str | None:
        key = (what, value)
        if key not in self._known:
            step = self.makers.get(value)
            self._known[key] = None if step is None else ask(step)
        return self._known[key]

    def _log(self, step: Step) -> str | None:
        op, first = step.op, step.inputs[0]
        if op == "exp" or (op == "function" and step.attrs["name"] == "exp_of_differences"):
            return first
        if op == "sigmoid":
            return self.add("sub", (first, self.add("softplus", (first,))))
        if (bound := self._bound(step)) is not None:
            return self._between(self.log(bound[0]), *(math.log(x) if x > 0 else None for x in bound[1:]))
        if op in ("affine", "scale"):
            return self._log_of_affine(step)
        if op in _RECIPROCALS or (op == "function" and step.attrs["name"] == "reciprocal_of_sum"):
            return self._log_of_reciprocal(first)
        if op == "mul":
            return self._log_of_product(*step.inputs)
        if op == "add":
            a, b = map(self.log, step.inputs)
            # log(e**a + e**b), of differences.
            return None if a is None or b is None else self.add("add", (b, self._softplus(self.add("sub", (a, b)))))
        if op in ("sum", "mean"):
            return self._log_of_sum(step)
        if op == "relu" or (op == "leaky_relu" and step.number("slope") == -1.0):
            return self.log(first)
        return self._log_of_moved(step, self.log)

    def _log_of_moved(self, step: Step, ask: Callable[[str], str | None]) -> str | None:
        if step.op not in _MOVES or (step.op == "take" and min(step.ints("indices")) < 0):
            return None
        parts = [ask(x) for x in step.inputs]
        known = [x for x in parts if x is not None]
        return self.moved(step, known) if len(known) == len(parts) else None

    def _softplus(self, value: str) -> str:
        return self.add("softplus", (value,))

    def _log_of_reciprocal(self, divisor: str) -> str | None:
        power, scale, shift = self.line(divisor)
        maker = self.makers.get(power)
        if maker is not None and maker.op == "exp" and (scale, shift) == (1.0, 1.0):
            # A sigmoid, in the form that others have.
            x = self.negative(maker.inputs[0])
            return self.add("sub", (x, self._softplus(x)))
        found = self.log(divisor)
        return None if found is None else self.line_of(found, -1.0, 0.0)

    def _log_of_affine(self, step: Step) -> str | None:
        source, scale, shift = self.line(step.output)
        if source == step.output:
            return None
        if scale < 0 < shift and math.isclose(-scale, shift, rel_tol=1e-6):
            rest = self.log_of_rest(source)
            return None if rest is None else self.line_of(rest, 1.0, _log(shift))
        found = self.log(source) if scale > 0 and shift >= 0 else None
        if found is None:
            return None
        if not shift:
            return self.line_of(found, 1.0, _log(scale))
        power = self.line_of(found, 1.0, _log(scale) - _log(shift))
        return self.line_of(self._softplus(power), 1.0, _log(shift))

    def _log_of_product(self, x: str, y: str) -> str | None:
        for p, inverse in ((x, y), (y, x)):
            if (odds := self._odds(p, inverse)) is not None:
                return odds
        a, b = self.log(x), self.log(y)
        if a is None and b is None:
            return None
        # One of them is positive, so the other one is where the product is.
        a, b = (self.add("log", (v,)) if found is None else found for v, found in ((x, a), (y, b)))
        return self.add("add", (a, b))

    def _odds(self, p: str, inverse: str) -> str | None:
        """Return the logarithm of p / (1 - p): where that is positive, so are both."""
        step = self.makers.get(inverse)
        if step is None or step.op not in _RECIPROCALS or self.line(step.inputs[0]) != (*self.line(p)[:1], -1.0, 1.0):
            return None
        found = self.logit(p)
        if found is None:
            rest = step.inputs[0]
            logs = [known or self.add("log", (v,)) for v, known in ((p, self.log(p)), (rest, self.log_of_rest(p)))]
            found = self.add("sub", logs)
        return found

    def _log_of_sum(self, step: Step) -> str | None:
        source, axes = step.inputs[0], step.ints("axes")
        found = self.log(source)
        if found is None:
            return None
        n = math.prod(self.shape(source)[a - 1] for a in axes)
        largest, total = self._sum_of_powers(found, axes, n)
        value = self.function(total, "log_of_sum", n)
        value = value if largest is None else self.add("add", (value, largest))
        value = self.line_of(value, 1.0, -math.log(n) if step.op == "mean" else 0.0)
        return value if self.shape(value) == step.shape else self.add("reshape", (value,), step.shape, shape=step.shape)

    def _sum_of_powers(self, log: str, axes: Sequence[int], n: int) -> tuple[str | None, str]:
        """Return the maximum, None where it is 0 already, and the sum of e to what is left."""
        largest = None if self._is_difference(log, axes) else self.reduced("max", log, axes)
        less = log if largest is None else self.add("sub", (log, largest))
        return largest, self.reduced("sum", self.function(less, "exp_of_differences", n), axes)

    def _is_difference(self, value: str, axes: Sequence[int]) -> bool:
        """Return whether a value is one less its maximum over an axis."""
        step = self.makers.get(value)
        most = self.makers.get(step.inputs[1]) if step is not None and step.op == "sub" else None
        if step is None or most is None or most.op != "max" or len(axes) != 1:
            return False
        return most.inputs[0] == step.inputs[0] and int(most.number("axis")) == axes[0]

    def softmax(self, log: str, axes: Sequence[int]) -> str:
        """Add e**x / sum e**x."""
        n = math.prod(self.shape(log)[a - 1] for a in axes)
        largest, total = self._sum_of_powers(log, axes, n)
        less = log if largest is None else self.add("sub", (log, largest))
        powers = self.function(less, "exp_of_differences", n)
        return self.add("mul", (powers, self.function(total, "reciprocal_of_sum", n)))

    def _bound(self, step: Step) -> tuple[str, float, float] | None:
        """Return what a value is between two constants, and these, 0 and infinity for none; None when it is not."""
        if step.op == "clip":
            low, high = step.number("low"), step.number("high")
            return step.inputs[0], max(low, 0.0), high if high < LIMIT else math.inf
        # As Max and Min are written, with x and c in either order: y + relu(x - y), x - relu(x - y).
        bent, slope, level = self.line(step.output)
        if bent == step.output and step.op in ("add", "sub"):
            bent = step.inputs[1]
        maker = self.makers.get(bent)
        if maker is None or maker.op != "relu":
            return None
        source, scale, shift = self.line(maker.inputs[0])
        least, most = (source, shift * -scale, math.inf), (source, 0.0, shift * -scale)
        if step.op in ("affine", "scale"):
            forms = {(1.0, 1.0, -shift): least, (-1.0, -1.0, shift): most}
            return forms.get((scale, slope, level))
        forms_of_two = {("add", -1.0): least, ("sub", 1.0): most}
        return forms_of_two.get((step.op, scale)) if step.inputs[0] == source else None

    def _between(self, value: str | None, low: float | None, high: float | None) -> str | None:
        """Add max(min(x, high), low), either None for none; the bounds are the keeper's."""
        if value is None:
            return None
        if high is not None and math.isfinite(high):
            over = self.add("relu", (self.line_of(value, 1.0, -high),))
            value = self.add("sub", (value, over))
        if low is not None and math.isfinite(low):
            value = self.line_of(self.add("relu", (self.line_of(value, 1.0, -low),)), 1.0, low)
        return value

    def _log_of_rest(self, step: Step) -> str | None:
        if step.op == "sigmoid":
            return self.line_of(self._softplus(step.inputs[0]), -1.0, 0.0)
        source, *numbers = self.line(step.output)
        if source != step.output:
            return self.log(source) if numbers == [-1.0, 1.0] else None
        if (bound := self._bound(step)) is not None:
            # 1 - x lies between 1 - high and 1 - low.
            value, low, high = bound
            logs = (_log(1 - high) if high < 1 else None, _log(1 - low) if 0 < low < 1 else None)
            return self._between(self.log_of_rest(value), *logs)
        return self._log_of_moved(step, self.log_of_rest)

    def _logit(self, step: Step) -> str | None:
        if step.op == "sigmoid":
            return step.inputs[0]
        source, *numbers = self.line(step.output)
        if source != step.output:
            found = self.logit(source) if numbers == [-1.0, 1.0] else None
            return None if found is None else self.line_of(found, -1.0, 0.0)
        if (bound := self._bound(step)) is not None:
            value, low, high = bound
            logits = [math.log(x / (1 - x)) if 0 < x < 1 else None for x in (low, high)]
            return self._between(self.logit(value), *logits)
        return self._log_of_moved(step, self.logit)

    # --- quotients

    def quotient(self, step: Step) -> str | None:
        """Return a quotient by a sum, of what is positive by its form, made otherwise; None for anything else."""
        if step.op in _RECIPROCALS:
            return self._moebius((0.0, 0.0, 1.0), step.inputs[0], None)
        for x, inverse in (step.inputs, step.inputs[::-1]) if step.op == "mul" else ():
            maker = self.makers.get(inverse)
            if maker is None or maker.op not in _RECIPROCALS:
                continue
            divisor = maker.inputs[0]
            found = self._normalised(x, divisor) or self._updated(x, divisor) or self._moebius(None, divisor, x)
            if found is not None and self.shape(found) == step.shape:
                return found
        return None

    def _summed(self, divisor: str) -> tuple[str, tuple[int, ...]] | None:
        """Return what a value is the sum of, without signs, and over which axes, which it keeps."""
        step = self.makers.get(divisor)
        if step is not None and step.op == "expand":
            return self._summed(step.inputs[0])
        bound = None if step is None else self._bound(step)
        if bound is not None and bound[1] <= _NOTHING and math.isinf(bound[2]):
            return self._summed(bound[0])
        if step is None or step.op != "sum" or not step.number("keepdims"):
            return None
        return self._without_sign(step.inputs[0]), step.ints("axes")

    def _without_sign(self, value: str) -> str:
        """Return what a magnitude is of: the value itself where it is positive."""
        step = self.makers.get(value)
        positive = step is not None and step.op == "leaky_relu" and step.number("slope") == -1.0
        return step.inputs[0] if step is not None and positive else value

    def _normalised(self, x: str, divisor: str) -> str | None:
        """Return x / sum x, a softmax of log x."""
        summed = self._summed(divisor)
        if summed is None or summed[0] != self._without_sign(x):
            return None
        found = self.log(x)
        return None if found is None else self.softmax(found, summed[1])

    def _updated(self, x: str, divisor: str) -> str | None:
        """Return (p + z) / (sum p + n z), z the truth of sum p = 0: as converters of scikit-learn keep from 0 / 0."""
        above, below = self.makers.get(x), self.makers.get(divisor)
        if above is None or below is None or above.op != "add" or below.op != "add":
            return None
        p, zero = above.inputs
        total, times = below.inputs
        summed = self._summed(total)
        source, *numbers = self.line(times)
        truth, *form = self.line(zero)
        maker = self.makers.get(truth)
        if summed is None or summed[0] != p or maker is None or maker.op != "indicator" or maker.inputs[0] != total:
            return None
        # z is 1 - t, and what is added below n - n t.
        same = source == truth and numbers[1] == -numbers[0] > 0
        if form != [-1.0, 1.0] or not same or maker.ints("knots") != (0, 1):
            return None
        log = self.log(p)
        if log is None:
            return None
        knot = round(_FLOAT_0 * 2**16)
        largest = self.reduced("max", log, summed[1])
        some = self.add("indicator", (largest,), knots=(knot,), below=0)
        share = 1.0 / numbers[1]
        even = self.add("scale", (some,), factor=-share, offset=share)
        return self.add("add", (self.add("mul", (self.softmax(log, summed[1]), some)), even))

    def _moebius(self, above: tuple[float, float, float] | None, divisor: str, x: str | None) -> str | None:
        """Return (a E + b) / (c E + d), E = e**y, c and d positive: a / c + (b / d - a / c) sigmoid(-(y + log(c / d))).

        Numbers come as factors of e**y, of e**-y and of 1.
        """
        base = self._power(divisor)
        if base is None:
            return None
        below = self._combined(divisor, base)
        above = self._combined(x, base) if above is None and x is not None else above
        if above is None or below is None:
            return None
        value = base
        if above[1] or below[1]:
            if above[2] or below[2]:
                return None
            # By e**y: factors of e**2y and of 1.
            above, below, value = (above[0], 0.0, above[1]), (below[0], 0.0, below[1]), self.line_of(base, 2.0, 0.0)
        a, _, b = above
        c, _, d = below
        if c <= 0 or d <= 0:
            return None
        turned = self.line_of(self.negative(value), 1.0, -math.log(c / d))
        return self.line_of(self.add("sigmoid", (turned,)), b / d - a / c, a / c)

    def _power(self, value: str, depth: int = 3) -> str | None:
        """Return the exponent of the first power of e in a sum."""
        step = self.makers.get(value)
        if step is None or not depth:
            return None
        if step.op == "exp":
            return step.inputs[0]
        parts = step.inputs if step.op in ("affine", "scale", "add", "sub") else ()
        return next((found for found in (self._power(x, depth - 1) for x in parts) if found is not None), None)

    def _combined(self, value: str, base: str, depth: int = 3) -> tuple[float, float, float] | None:
        """Return a value as factors of e**base, of e**-base and of 1, None when it is none."""
        step = self.makers.get(value)
        if step is None or not depth:
            return None
        if step.op == "exp":
            if step.inputs[0] == base:
                return 1.0, 0.0, 0.0
            return (0.0, 1.0, 0.0) if self._is_negative(step.inputs[0], base) else None
        parts = [self._combined(x, base, depth - 1) for x in step.inputs]
        if step.op in ("affine", "scale"):
            numbers, part = single_numbers(step), parts[0]
            if numbers is None or part is None:
                return None
            return part[0] * numbers[0], part[1] * numbers[0], part[2] * numbers[0] + numbers[1]
        if step.op not in ("add", "sub") or None in parts:
            return None
        sign = -1.0 if step.op == "sub" else 1.0
        left, right = (x for x in parts if x is not None)
        return left[0] + sign * right[0], left[1] + sign * right[1], left[2] + sign * right[2]

    def _is_negative(self, value: str, other: str) -> bool:
        """Return whether one of two values is the other one's negative."""
        return (value, -1.0, 0.0) == self.line(other) or (other, -1.0, 0.0) == self.line(value)

    # --- places of maxima

    def ordered_as(self, value: str, axis: int) -> str | None:
        """Return a value whose elements along an axis are in the order of another one's; None when none is known."""
        found, low, high = value, -math.inf, math.inf
        while (step := self.makers.get(found)) is not None:
            first, one = step.inputs[0], [x for x in step.inputs[1:] if self.shape(x)[axis - 1] == 1]
            name = step.attrs.get("name", "") if step.op == "function" else step.op
            if name in ("exp", "exp_of_differences") and step.op != "spline":
                found = first
            elif step.op == "sigmoid":
                found, low, high = first, max(low, _SIGMOID_0), min(high, _FLOAT_1)
            elif step.op in ("sub", "add") and one and self.shape(first) == step.shape:
                found = first
            elif step.op == "sub" and self._is_log_of_sigmoid(step):
                found, high = first, min(high, _FLOAT_1)
            elif step.op == "mul" and one and self._is_never_negative(one[0]):
                # Where it is 0 all are equal, as they are then in float32.
                low = max(low, _FLOAT_0) if self.makers[one[0]].op == "indicator" else low
                found = first
            else:
                break
        if found == value:
            return None
        finite = math.isfinite(low) or math.isfinite(high)
        return self.add("clip", (found,), low=max(low, -LIMIT), high=min(high, LIMIT)) if finite else found

    def _is_log_of_sigmoid(self, step: Step) -> bool:
        other = self.makers.get(step.inputs[1])
        return other is not None and other.op == "softplus" and other.inputs[0] == step.inputs[0]

    def _is_never_negative(self, value: str) -> bool:
        step = self.makers.get(value)
        if step is None:
            return False
        return step.op == "indicator" or (step.op == "function" and step.attrs["name"] == "reciprocal_of_sum")


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _found(step: Step, maker: _Maker) -> str | None:
    if step.op == "log":
        return maker.log(step.inputs[0])
    return maker.ordered_as(step.inputs[0], int(step.number("axis"))) if step.op == "argmax" else maker.quotient(step)


def logarithms(net: Net) -> Net:
    """Logarithms of sigmoids, softmaxes, powers of e, and of their sums and products (`LogSigmoid`, `LogSoftmax`, \
`LogSumExp`, `Softplus`, logits written out), and their quotients by a sum, are made without the number; a function \
of a number that fixed point does not hold."""
    # Products before the reciprocals in them.
    known = ("log", "argmax", "mul")
    for step in (s for ops in (known, _RECIPROCALS) for s in net.steps if s.op in ops):
        maker = _Maker(net, step)
        found = _found(step, maker)
        if found is None:
            continue
        last = Step("identity", step.name, (found,), step.output, step.shape)
        last = replace(step, inputs=(found,)) if step.op == "argmax" else last
        at = next(i for i, s in enumerate(net.steps) if s is step)
        return logarithms(net.having([*net.steps[:at], *maker.added, last, *net.steps[at + 1 :]]))
    return net
