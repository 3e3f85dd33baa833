"""Numbers that stand for infinity: found where they take scores out of a softmax or the like, and made small there.

Exporters write a mask as scores + (1 - mask) * C, as Where(mask, scores, C) or as scores + a constant, with C of -1e4,
-65504, -1e9, the least float32 or -inf. Comparisons decide 2**15, so C is made `_AWAY` where that is the same: where
all that C reaches, through operators that move, add and choose, are functions that C takes to their end. Beyond its
end such a function stays as it is; a softmax sees differences only, and e**d is 0 below -14.

What this rests on: scores lie within 2034 of 0. A constant that goes elsewhere too is left as it is, or refused by name
where a comparison would have to decide it.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from protocols.limits import FRAC_BITS
from protocols.program.program import Shape
from securemtk.onnx.building.builder import Draft
from securemtk.onnx.building.operands import Formula, is_integral
from securemtk.onnx.building.proofs import MOVES, Proofs
from securemtk.onnx.building.registry import RULES, Refused, Step, sample_axis
from securemtk.onnx.model.graph import Array, Graph, Node, unique

# Numbers up to the first stay as they are, unless larger ones are added up with them, then those up to the second: two
# of them and scores of 4096 are compared.
_HELD, _SOFT = 10_000.0, 5_000.0
# What comparisons decide beside other values.
_COMPARED = 24_576.0
# What takes a score out.
_AWAY = 4096.0
# Of a softmax that numbers of several tiers go to: soft ones, those of `_FORGETS`, and infinity. What is out by less
# counts in a row where all is out.
_TIERS = (3072.0, 7168.0, 14_336.0)
# From here on float32 forgets the score that it is added to: a row that is out as a whole is even.
_FORGETS = 2.0**29
# Up to here what is multiplied by the number of the file need not be 0 or 1.
_FRACTIONS = 65_536.0

# Functions that stay as they are below some number, or on both sides; and what only asks which number is the largest.
_LOW = ("Exp", "Relu", "Elu", "Selu", "Celu", "Softplus")
_BOTH = ("Sigmoid", "Tanh", "Erf", "HardSigmoid")
_PLACES = ("ArgMax", "ArgMin", "Hardmax")
# These compare, and what they make may be the number itself.
_COMPARING = (
    *("ReduceMax", "ReduceMin", "TopK", "MaxPool", "GlobalMaxPool", "Max", "Min"),
    *("LogSoftmax", "ReduceLogSumExp"),
)
_KNOWN = ("Softmax", *_PLACES, *_LOW, *_BOTH)
_REMEDY = "use a number of -10000 for what is left out, or put it right before a softmax"


@dataclass(frozen=True)
class _End:
    """Where a value goes: the last operator, what it is multiplied by on the way, and what is added to it.

    Args:
        op, node: the operator, and its node's name.
        factor: what the value is multiplied by.
        added: 0 for nothing, 1 for constants, 2 for what is computed.
    """

    op: str
    node: str
    factor: float
    added: int


@dataclass(frozen=True)
class _Level:
    """A number that comes to an end, as the file has it, and whether anything is added to it."""

    number: float
    summed: bool

    @property
    def tier(self) -> int:
        """Return its place in `_TIERS`."""
        return _tier(self.number)


@dataclass(frozen=True)
class _Site:
    """A large number in a model: an input of a node, what goes where the node's result goes, and where."""

    node: Node
    index: int
    value: Array
    ends: frozenset[_End]


class Whole(Protocol):
    """A node that is translated by what it means together with others."""

    def steps(self, node: Node, graph: Graph) -> list[Step]:
        """Return its steps, or raise Refused."""


@dataclass(frozen=True)
class _Refusal:
    """A node that cannot be translated where it stands."""

    reason: str

    def steps(self, node: Node, graph: Graph) -> list[Step]:
        raise Refused(self.reason, _REMEDY)


@dataclass(frozen=True)
class _ClippedProduct:
    """A mask that may be any number times a large one: between bounds, and times a smaller one."""

    index: int
    bound: float
    factor: float

    def steps(self, node: Node, graph: Graph) -> list[Step]:
        formula = Formula(node, graph)
        kept = formula.apply("clip", formula.operand(self.index), low=-self.bound, high=self.bound)
        return formula.steps(formula.mul(kept, np.full((1,) * (len(formula.result_shape) + 1), self.factor)))


@dataclass(frozen=True)
class _Softmax:
    """A softmax whose rows may be out as a whole: they are then even, or 0 for what is no number.

    Args:
        even: which of both.
        bound: where all of a row is below it, all of it is out.
        several: whether several numbers leave out: only where the least of them does is a row even.
    """

    even: bool
    bound: float
    several: bool

    def steps(self, node: Node, graph: Graph) -> list[Step]:
        output = f"{node.outputs[0]}/of scores"
        # As if the softmax were a node before this one.
        graph.shapes[output] = graph.shapes[node.outputs[0]]
        before = RULES["Softmax"](replace(node, name=f"{node.name}/of scores", outputs=(output,)), graph)
        draft = Draft(node, graph)
        out, flat = _all_out(node, graph, draft, self.bound)
        some = draft.scale(out, -1.0, 1.0)
        made = draft.binary("mul", draft.reshape(output, flat), some)
        if self.even:
            n = math.prod(flat) // math.prod(draft.shape(out))
            made = draft.binary("add", made, self._even(node, draft, out, n, flat))
        return [*before, *draft.made(draft.reshape(made, graph.shapes[node.outputs[0]]))]

    def _even(self, node: Node, draft: Draft, out: str, n: int, flat: Shape) -> str:
        """Add the row that is even where all is out, and 0 elsewhere."""
        if not self.several or n == 1:
            return draft.scale(out, 1.0 / n)
        scores = draft.reshape(node.input(0), flat)
        axis = next(i for i, (a, b) in enumerate(zip(flat, draft.shape(out), strict=True), 1) if a != b)
        less = draft.binary("sub", scores, draft.largest(scores, (axis,)))
        knot = round(-_AWAY / 2 * 2.0**FRAC_BITS)
        near = draft.add("indicator", (less,), flat, knots=(knot,), below=0)
        share = draft.function(draft.reduce("sum", near, (axis,)), "reciprocal_of_sum", n)
        return draft.binary("mul", near, draft.binary("mul", share, out))


@dataclass(frozen=True)
class _NoNumber:
    """The truth of a softmax's being no number, which it is where a row is out as a whole."""

    softmax: Node
    bound: float

    def steps(self, node: Node, graph: Graph) -> list[Step]:
        draft = Draft(node, graph)
        out, flat = _all_out(self.softmax, graph, draft, self.bound)
        return draft.made(draft.reshape(draft.expand(out, flat), graph.shapes[node.outputs[0]]))


@dataclass(frozen=True)
class _Itself:
    """A choice that always takes one of its inputs."""

    source: str

    def steps(self, node: Node, graph: Graph) -> list[Step]:
        return [Step("identity", node.name, (self.source,), node.outputs[0], graph.shapes[node.outputs[0]])]


def _all_out(softmax: Node, graph: Graph, draft: Draft, bound: float) -> tuple[str, Shape]:
    """Add the truth of each row's being below a bound; return it, and the shape in which rows are one axis."""
    source = softmax.input(0)
    shape, new = graph.shapes[source], softmax.opset >= 13
    axis = sample_axis(graph, int(softmax.attrs.get("axis", -1 if new else 1)), graph.rank(source), "a softmax")
    flat = shape if new else (*shape[: axis - 1], math.prod(shape[axis - 1 :]))
    largest = draft.largest(draft.reshape(source, flat), (axis,))
    knot = round(bound * 2.0**FRAC_BITS)
    return draft.add("indicator", (largest,), draft.shape(largest), knots=(knot,), below=1), flat


@dataclass
class Masks:
    """Nodes by their names: those that are changed, and those that mean something together with others."""

    nodes: dict[str, Node] = field(default_factory=dict)
    wholes: dict[str, Whole] = field(default_factory=dict)


def find(graph: Graph) -> Masks:
    """Find what masks; smaller constants are added to the graph's."""
    return _Search(graph).run()


class _Search:
    def __init__(self, graph: Graph) -> None:
        self._found = Masks()
        self._graph, self._proofs = graph, Proofs(graph)
        self._users: dict[str, list[tuple[Node, int]]] = {}
        for node in graph.nodes:
            for i, name in enumerate(node.inputs):
                self._users.setdefault(name, []).append((node, i))
        self._ends: dict[str, frozenset[_End]] = {}
        # What comes to each end, by the name of its node, and from how many places.
        self._levels: dict[str, set[_Level]] = {}
        self._places: Counter[str] = Counter()

    def run(self) -> Masks:
        known = [n for n in self._graph.nodes if not n.domain and n.outputs[0] in self._graph.shapes]
        sites = [site for node in known for site in self._sites(node)]
        for site in sites:
            self._note(site)
        for site in sites:
            if self._is_everywhere(site) and not {x.op for x in site.ends} <= {"Softmax", *_PLACES}:
                # A sum with a large number, and no mask: only a softmax does not see it.
                continue
            make = self._product if site.node.op_type in ("Mul", "Div") else self._constant
            if not make(site):
                self._refuse_compared(site)
        for node in known:
            self._check(node)
            if node.op_type == "Softmax":
                self._rows(node)
        return self._found

    # --- large numbers and where they go

    def _sites(self, node: Node) -> list[_Site]:
        """Return the large numbers of a node: constants, and what masks are multiplied by."""
        if node.op_type in ("Mul", "Div"):
            return self._factors(node)
        if node.op_type not in ("Add", "Sub", "Sum", "Where", "Concat"):
            return []
        found = []
        for i in range(node.op_type == "Where", len(node.inputs)):
            value = self._proofs.constant(node.input(i))
            if value is None or value.dtype.kind != "f" or not (np.abs(value) > _SOFT).any() or np.isnan(value).any():
                continue
            sign = -1.0 if node.op_type == "Sub" and i == 1 else 1.0
            ends = self._reached(node, sign, added=2 * (node.op_type in ("Add", "Sub", "Sum")))
            found.append(_Site(node, i, value.astype(np.float64), ends))
        return found

    def _factors(self, node: Node) -> list[_Site]:
        numbers = [self._proofs.number(x) for x in node.inputs]
        index = next((i for i, x in enumerate(numbers) if x is not None), None)
        if index is None or (node.op_type == "Div" and index == 0):
            return []
        number = numbers[index] or 0.0
        number = number if node.op_type == "Mul" else 1.0 / number if number else math.inf
        other = node.input(1 - index)
        if not abs(number) > _SOFT or not self._is_mask(other):
            return []
        ends = self._reached(node, 1.0, added=0)
        # 1 - m is a mask wherever it is added to something, m itself only beside what is computed: scores.
        least = 1 if self._is_rest(other) else 2
        fits = all(x.added >= least and x.op in ("Softmax", *_PLACES) for x in ends)
        if not fits and not self._proofs.is_sign(other):
            # Any product with a large number.
            return []
        return [_Site(node, index, np.asarray(number), ends)]

    def _is_mask(self, name: str) -> bool:
        """Return whether a value is made of truth values or, by products and differences from 1, of inputs."""
        node = self._proofs.makers.get(name)
        if self._proofs.is_sign(name) or node is None:
            return name in self._graph.activations
        if node.op_type in MOVES or node.op_type in ("Cast", "CastLike", "Neg"):
            return self._is_mask(node.input(0))
        if node.op_type == "Sub":
            return any(
                self._proofs.number(one) == 1.0 and self._is_mask(other)
                for one, other in (node.inputs, node.inputs[::-1])
            )
        known = [self._proofs.is_sign(x) or self._is_mask(x) for x in node.inputs]
        return node.op_type in ("Mul", "Min", "Max") and all(known)

    def _is_rest(self, name: str) -> bool:
        """Return whether a value is 1 less another one, or its negative."""
        node = self._proofs.makers.get(name)
        if node is not None and node.op_type in (*MOVES, "Cast", "CastLike", "Neg"):
            return self._is_rest(node.input(0))
        return node is not None and node.op_type == "Sub" and 1.0 in map(self._proofs.number, node.inputs)

    def _note(self, site: _Site) -> None:
        for end in site.ends:
            numbers = site.value[np.abs(site.value * end.factor) > _SOFT] * np.sign(end.factor)
            if site.node.op_type in ("Mul", "Div"):
                # Which of its numbers leaves in is not known of a mask; those that leave out are below 0.
                numbers = -np.abs(numbers)
            levels = {_Level(float(x), end.added > 0) for x in np.unique(numbers)}
            self._levels.setdefault(end.node, set()).update(levels)
            self._places[end.node] += any(x.number < 0 for x in levels)

    def _is_mixed(self, ends: frozenset[_End]) -> bool:
        """Return whether numbers of several tiers come to one end."""
        return any(len({x.tier for x in self._levels[end.node] if x.number < 0}) > 1 for end in ends)

    def _is_everywhere(self, site: _Site) -> bool:
        """Return whether a large number is added to all elements, and finite."""
        added = site.node.op_type in ("Add", "Sub", "Sum")
        return added and bool((np.abs(site.value) > _SOFT).all() and np.isfinite(site.value).all())

    def _constant(self, site: _Site) -> bool:
        """Make a constant smaller; return False where that may not be the same."""
        factor, mixed = _common_factor(site.ends), self._is_mixed(site.ends)
        if factor is None:
            return False
        least = _SOFT if mixed else _HELD
        size, large = np.abs(site.value * factor), np.abs(site.value * factor) > least
        rest = size[~large].max(initial=0.0)
        signs = np.sign(site.value[large] * factor)
        if (signs > 0).any() and any(x.op in _LOW for x in site.ends):
            return False
        for sign in (-1, 1):
            # Of two different numbers the smaller one would count in a row where all is out.
            levels = np.unique(size[large][signs == sign])
            if len(levels) > 1 and (levels < _FORGETS).any() and not mixed:
                return False
        if rest > _HELD - _AWAY:
            return False
        tiers = np.array([self._away(x, mixed) for x in site.value.ravel()]).reshape(size.shape)
        away = np.sign(site.value) * (tiers + (rest if rest > _AWAY / 4 else 0.0)) / abs(factor)
        self._put(site, np.where(large, away, site.value))
        return True

    def _away(self, number: float, mixed: bool) -> float:
        return _TIERS[_tier(number)] if mixed else _AWAY

    def _put(self, site: _Site, value: Array) -> None:
        taken = {*self._graph.constants, *self._graph.activations}
        name = unique(f"{site.node.input(site.index)}/of {site.node.name}", taken)
        self._graph.constants[name] = value
        node = self._found.nodes.get(site.node.name, site.node)
        inputs = (*node.inputs[: site.index], name, *node.inputs[site.index + 1 :])
        self._found.nodes[node.name] = replace(node, inputs=inputs)

    def _product(self, site: _Site) -> bool:
        """Make what a mask is multiplied by smaller; return False where that may not be the same."""
        node, number = site.node, float(site.value)
        factor, mixed, other = _common_factor(site.ends), self._is_mixed(site.ends), node.input(1 - site.index)
        if factor is None:
            return False
        size = abs(number * factor)
        if size <= (_SOFT if mixed else _HELD):
            return True
        proofs = self._proofs
        low_only = proofs.is_truth(other) and number * factor < 0
        if not low_only and any(x.op in _LOW + _BOTH for x in site.ends):
            return False
        smaller = math.copysign(self._away(number, mixed) / abs(factor), number)
        if proofs.is_sign(other):
            self._put(site, np.asarray(smaller if node.op_type == "Mul" else 1.0 / smaller))
            return True
        if is_integral(other, self._graph):
            whole = _ClippedProduct(1 - site.index, 1.0, smaller)
        elif size <= _FRACTIONS:
            whole = _ClippedProduct(1 - site.index, 1 / 8, 8 * smaller if mixed else number)
        else:
            whole = _ClippedProduct(1 - site.index, 2.0**-10, 1024 * smaller)
        self._found.wholes[node.name] = whole
        return True

    def _refuse_compared(self, site: _Site) -> None:
        """Refuse a node whose number stays and comes to a comparison that cannot decide it."""
        size = float(np.abs(site.value).max())
        met = {x.op for x in site.ends if x.op in _KNOWN + _COMPARING and size * abs(x.factor) >= _COMPARED}
        if met:
            names = " and ".join(sorted({x.op for x in site.ends} - set(_KNOWN) or met))
            reason = f"its number of size {size:g} goes to {names}, where comparisons cannot decide it"
            self._found.wholes[site.node.name] = _Refusal(reason)

    def _check(self, node: Node) -> None:
        """Refuse an end to which numbers of both signs come that are not of one size."""
        sizes = {s: [abs(x.number) for x in self._levels.get(node.name, ()) if x.number * s > 0] for s in (-1, 1)}
        if not all(sizes.values()) or node.op_type not in _KNOWN:
            return
        differ = {*sizes[-1]} != {*sizes[1]} and min(*sizes[-1], *sizes[1]) < _FORGETS
        if differ or node.op_type in _LOW + _BOTH:
            self._found.wholes[node.name] = _Refusal("large numbers of both signs and of several sizes come to it")

    # --- the way there

    def _reached(self, node: Node, factor: float, *, added: int) -> frozenset[_End]:
        """Return where a node's result goes."""
        if not self._ends:
            # The last values first: a network is deeper than calls may be nested.
            for each in reversed(self._graph.nodes):
                self._ends |= {output: self._ends_from(output) for output in each.outputs}
        found = self._ends[node.outputs[0]]
        return frozenset(replace(x, factor=x.factor * factor, added=max(x.added, added)) for x in found)

    def _ends_from(self, name: str) -> frozenset[_End]:
        found = {_End("output", name, 1.0, 0)} if name in self._graph.outputs else set[_End]()
        for node, index in self._users.get(name, ()):
            if node.op_type == "ReduceMax" and self._is_taken_off(node):
                # As a softmax written by hand does it: what is left is 0 at most, and moves a whole row.
                continue
            passed = self._passed(node, index)
            if passed is None:
                found.add(_End(node.op_type, node.name, 1.0, 0))
                continue
            factor, added = passed
            for x in self._ends.get(node.outputs[0], ()):
                found.add(replace(x, factor=x.factor * factor, added=max(x.added, added)))
        return frozenset(found)

    def _passed(self, node: Node, index: int) -> tuple[float, int] | None:
        """Return the factor with which a value passes an operator, and what is added; None for an end."""
        op = node.op_type
        if node.domain or node.outputs[0] not in self._graph.shapes:
            return None
        if (op in MOVES or op in ("Cast", "CastLike")) and not index and len(node.outputs) == 1:
            return (1.0, 0) if np.dtype(self._graph.dtypes[node.outputs[0]]).kind == "f" else None
        if op in ("Add", "Sum", "Sub"):
            others = [x for i, x in enumerate(node.inputs) if i != index]
            return (-1.0 if op == "Sub" and index else 1.0), 1 + any(x in self._graph.activations for x in others)
        if op == "Concat" or (op == "Where" and index):
            return 1.0, 0
        if op == "Neg":
            return -1.0, 0
        number = self._proofs.number(node.input(1 - index)) if op in ("Mul", "Div") else None
        if number and 2.0**-6 <= abs(number) <= 2.0**6 and (op == "Mul" or not index):
            return (number if op == "Mul" else 1.0 / number), 0
        return None

    def _is_taken_off(self, largest: Node) -> bool:
        users = self._users.get(largest.outputs[0], [])
        takes = [n for n, i in users if n.op_type == "Sub" and i == 1 and n.input(0) == largest.input(0)]
        return bool(users) and len(takes) == len(users) and largest.outputs[0] not in self._graph.outputs

    # --- rows that are out as a whole

    def _rows(self, softmax: Node) -> None:
        """Decide what becomes of rows that are out as a whole, and of questions whether they are numbers."""
        levels = {x for x in self._levels.get(softmax.name, ()) if x.number < 0}
        mixed, several = len({x.tier for x in levels}) > 1, self._places[softmax.name] > 1
        soft, hard, none = (-x for x in _TIERS)
        asking = [n for n in self._askers(softmax) if n.op_type == "IsNaN"]
        if asking and any(math.isinf(x.number) for x in levels):
            bound = (hard + none) / 2 if mixed else -_AWAY / 2
            self._found.wholes.setdefault(softmax.name, _Softmax(even=False, bound=bound, several=several))
            for question in asking:
                self._answer(question, _NoNumber(softmax, bound))
        elif any(x.summed and x.tier == 1 for x in levels):
            bound = (soft + hard) / 2 if mixed else -_AWAY / 2
            self._found.wholes.setdefault(softmax.name, _Softmax(even=True, bound=bound, several=several))

    def _askers(self, node: Node) -> list[Node]:
        """Return what uses a value, or the value under another type."""
        found: list[Node] = []
        for user, _ in self._users.get(node.outputs[0], ()):
            found += self._askers(user) if user.op_type in ("Cast", "Identity", "Dropout") else [user]
        return found

    def _answer(self, question: Node, answer: _NoNumber) -> None:
        self._found.wholes[question.name] = answer
        for user in self._askers(question):
            # What is no number is 0 already.
            same = user.op_type == "Where" and user.input(2) == question.input(0)
            if same and self._proofs.number(user.input(1)) == 0.0:
                self._found.wholes[user.name] = _Itself(user.input(2))


def _tier(number: float) -> int:
    return 2 if math.isinf(number) else int(abs(number) >= _FORGETS)


def _common_factor(ends: frozenset[_End]) -> float | None:
    """Return what a number is multiplied by before it takes functions to their ends, None where it does not."""
    factors = {x.factor for x in ends}
    return factors.pop() if len(factors) == 1 and all(x.op in _KNOWN for x in ends) else None
