"""Well-known functions that exporters write as formulas of others: found again, and made one step.

Within a formula every value is P(x) F + R(x), where F is one function of a polynomial of x, its heart, and P and R are
polynomials too. Written so, all orders in which exporters multiply and add look the same.

A formula is known by its numbers, which are single constants of the file. What is found is a function that everybody
knows, and that it is there becomes public; no other constant shows.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from protocols.program.program import Attribute
from securemtk.onnx.building.lower import custom, straight
from securemtk.onnx.building.registry import Step
from securemtk.onnx.passes.net import Net

Polynomial = tuple[float, ...]
_DEGREE = 4
# Formulas are short: nothing is looked for further back than so many steps and values.
_DEPTH, _WIDTH = 8, 12
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Form:
    """P(x) F + R(x): coefficients, the lowest power first."""

    factor: Polynomial
    rest: Polynomial


@dataclass(frozen=True)
class _Known:
    """A formula: heart F of a polynomial of x, then P and R; and the step that it is."""

    heart: str
    inside: Polynomial
    form: _Form
    op: str
    attrs: Mapping[str, Attribute]


_X: Polynomial = (0.0, 1.0)
_HALF_X = _Form((0.0, 0.5), (0.0, 0.5))
_TIMES_X = _Form(_X, ())
_ROOT = math.sqrt(2 / math.pi)
_HARD_SIGMOID = straight((-3.0, 3.0), (0.0, 0.0), (0.5, 1 / 6), (1.0, 0.0))
_KNOWN = (
    _Known("erf", (0.0, math.sqrt(0.5)), _HALF_X, "gelu", {}),
    _Known("tanh", (0.0, _ROOT, 0.0, 0.044715 * _ROOT), _HALF_X, "gelu_tanh", {}),
    _Known("sigmoid", _X, _TIMES_X, "silu", {}),
    # The approximation of Gelu that CLIP and some others have.
    _Known("sigmoid", (0.0, 1.702), _TIMES_X, "function", custom("swish", 1.702)),
    _Known("tanh of softplus", _X, _TIMES_X, "mish", {}),
    _Known("clip 0 6", (3.0, 1.0), _Form((0.0, 1 / 6), ()), "hard_swish", {}),
    _Known("clip 0 6", (3.0, 1.0), _Form((1 / 6,), ()), "function", _HARD_SIGMOID),
    _Known("clip 0 1", (0.5, 1 / 6), _TIMES_X, "hard_swish", {}),
    _Known("clip 0 1", (0.5, 1 / 6), _Form((1.0,), ()), "function", _HARD_SIGMOID),
    _Known("hard sigmoid", _X, _TIMES_X, "hard_swish", {}),
    # As classifiers of scikit-learn write it. Exp and Reciprocal by themselves hold for a small part of these values.
    _Known("one over 1 + exp", (0.0, -1.0), _Form((1.0,), ()), "sigmoid", {}),
)


def known_functions(net: Net) -> Net:
    """`Sigmoid`, `Gelu`, `Silu`, `Mish`, `HardSwish` and `HardSigmoid` that are formulas become one function; the \
rounds of the products in them."""
    makers = {step.output: step for step in net.steps}
    for step in net.steps:
        heart, source = _heart(step, makers)
        for base in _bases(source, makers) if heart else ():
            found = _found(net, step, heart, source, base, makers)
            if found is not None:
                return known_functions(net.having([found if s.output == found.output else s for s in net.steps]))
    return net


def _heart(step: Step, makers: Mapping[str, Step]) -> tuple[str, str]:
    """Return the name of a step that can be the heart of a formula, "" for none, and what it works on."""
    source = step.inputs[0]
    if step.op in ("erf", "sigmoid"):
        return step.op, source
    if step.op == "tanh":
        before = makers.get(source)
        return ("tanh of softplus", before.inputs[0]) if before and before.op == "softplus" else ("tanh", source)
    if step.op == "clip":
        return f"clip {step.number('low'):g} {step.number('high'):g}", source
    if step.op == "function" and _is_hard_sigmoid(step):
        return "hard sigmoid", source
    if step.op == "reciprocal":
        plus_one = makers.get(source)
        power = makers.get(plus_one.inputs[0]) if plus_one and plus_one.op in ("affine", "scale") else None
        if plus_one and power and power.op == "exp" and single_numbers(plus_one) == (1.0, 1.0):
            return "one over 1 + exp", power.inputs[0]
    return "", source


def _is_hard_sigmoid(step: Step) -> bool:
    found, wanted = _straight_numbers(step.attrs), _straight_numbers(_HARD_SIGMOID)
    return len(found) == len(wanted) and np.allclose(found, wanted, atol=_TOLERANCE)


def _straight_numbers(attrs: Mapping[str, Attribute]) -> list[float]:
    return [float(v) for v in attrs.values() if attrs["name"] == "straight" and isinstance(v, int | float)]


def _bases(source: str, makers: Mapping[str, Step]) -> list[str]:
    """Return what a formula can be a formula of: the values that lead to its heart by sums and products."""
    found: list[str] = []
    row = [source]
    while row and len(found) < _WIDTH:
        value = row.pop(0)
        if value not in found:
            found.append(value)
            step = makers.get(value)
            if step is not None and step.op in _ALGEBRA:
                row += step.inputs
    # The shortest formula has the heart's own input as its variable; longer ones are tried first.
    return found[::-1]


_ALGEBRA = ("affine", "scale", "add", "sub", "mul")


def _found(net: Net, heart_step: Step, heart: str, source: str, base: str, makers: Mapping[str, Step]) -> Step | None:
    """Return the step that takes the place of the last one of a known formula of `base`, None when there is none."""
    inside = _polynomial(source, base, makers)
    if inside is None:
        return None
    candidates = [k for k in _KNOWN if k.heart == heart and _equal(k.inside, inside)]
    if not candidates:
        return None
    forms: dict[str, _Form] = {heart_step.output: _Form((1.0,), ())}
    for step in _behind(net, heart_step):
        form = _form(step, forms, base, makers)
        if form is None:
            continue
        forms[step.output] = form
        for known in candidates:
            whole = _equal(known.form.factor, form.factor) and _equal(known.form.rest, form.rest)
            if whole and step.shape == heart_step.shape and _only_for(net, step, forms):
                return Step(known.op, step.name, (base,), step.output, step.shape, attrs=known.attrs)
    return None


def _behind(net: Net, step: Step) -> Iterator[Step]:
    """Yield a step itself and all behind it."""
    at = next(i for i, s in enumerate(net.steps) if s is step)
    yield from net.steps[at:]


def _only_for(net: Net, last: Step, forms: Mapping[str, _Form]) -> bool:
    """Return whether what a formula makes on its way serves nothing else."""
    inner = forms.keys() - {last.output}
    users = [s.output for x in inner for s in net.users(x)]
    return not inner.intersection(net.outputs) and all(x in forms for x in users)


def _form(step: Step, forms: Mapping[str, _Form], base: str, makers: Mapping[str, Step]) -> _Form | None:
    if step.output in forms:
        return forms[step.output]
    if step.op not in _ALGEBRA or not any(x in forms for x in step.inputs):
        return None
    numbers = single_numbers(step)
    if len(step.inputs) == 1:
        form = forms[step.inputs[0]]
        return None if numbers is None else _plus(_times(form, (numbers[0],)), _Form((), (numbers[1],)))
    left, right = (forms.get(x) or _as_rest(_polynomial(x, base, makers)) for x in step.inputs)
    if left is None or right is None:
        return None
    if step.op == "mul":
        if left.factor and right.factor:
            return None
        return _times(left, right.rest) if left.factor else _times(right, left.rest)
    return _plus(left, _times(right, (-1.0 if step.op == "sub" else 1.0,)))


def _as_rest(value: Polynomial | None) -> _Form | None:
    return None if value is None else _Form((), value)


def _times(form: _Form, by: Polynomial) -> _Form:
    return _Form(_product(form.factor, by), _product(form.rest, by))


def _plus(x: _Form, y: _Form) -> _Form:
    return _Form(_sum(x.factor, y.factor), _sum(x.rest, y.rest))


def _polynomial(value: str, base: str, makers: Mapping[str, Step], depth: int = _DEPTH) -> Polynomial | None:
    """Return a value as a polynomial of another one, None when it is none."""
    if value == base:
        return _X
    step = makers.get(value)
    if step is None or step.op not in _ALGEBRA or not depth:
        return None
    parts = [_polynomial(x, base, makers, depth - 1) for x in step.inputs]
    if any(p is None or len(p) > _DEGREE for p in parts):
        return None
    first, *others = (p for p in parts if p is not None)
    if not others:
        numbers = single_numbers(step)
        return None if numbers is None else _sum(_product(first, (numbers[0],)), (numbers[1],))
    if step.op == "mul":
        return _product(first, others[0])
    return _sum(first, _product(others[0], (-1.0 if step.op == "sub" else 1.0,)))


def single_numbers(step: Step) -> tuple[float, float] | None:
    """Return factor and addend of a step, None when they are not single numbers."""
    if step.op == "scale":
        return step.number("factor"), step.number("offset")
    if any(p.size != 1 for p in step.params.values()):
        return None
    scale, shift = (step.params.get(role) for role in ("scale", "shift"))
    return 1.0 if scale is None else scale.item(), 0.0 if shift is None else shift.item()


def line(value: str, makers: Mapping[str, Step]) -> tuple[str, float, float]:
    """Return x, a and b of a value a x + b with single numbers; of any other the value itself, 1 and 0."""
    scale, shift = 1.0, 0.0
    while (step := makers.get(value)) is not None and step.op in ("affine", "scale"):
        numbers = single_numbers(step)
        if numbers is None:
            break
        value, scale, shift = step.inputs[0], scale * numbers[0], scale * numbers[1] + shift
    return value, scale, shift


def _product(x: Polynomial, y: Polynomial) -> Polynomial:
    return tuple(np.convolve(x, y).tolist()) if x and y else ()


def _sum(x: Polynomial, y: Polynomial) -> Polynomial:
    longest = max(len(x), len(y))
    return tuple(sum(p[i] for p in (x, y) if i < len(p)) for i in range(longest))


def _equal(x: Polynomial, y: Polynomial) -> bool:
    return all(abs(v) < _TOLERANCE for v in _sum(x, _product(y, (-1.0,))))
