"""A network as a public list of layers with shapes.

A `Program` says what is computed, never with which weights: it holds no parameter value and
may be shown to every role. Parameters are float32 arrays by name, held by the keeper alone.

Every activation has the batch as its first axis; shapes here are those of one sample, without it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from protocols.errors import IntegrityError
from protocols.limits import FEWEST_WEIGHT_BITS, FRAC_BITS, LIMIT_BITS, MOST_WEIGHT_BITS

Shape = tuple[int, ...]
Attribute = int | float | str | tuple[int, ...]

# operator -> (number of inputs or None for any, parameters by role, attributes).
# Shapes below are of one sample; `...` stands for any number of axes.
OPERATORS: dict[str, tuple[int | None, tuple[str, ...], tuple[str, ...]]] = {
    # (..., C_in, H, W) -> (..., C_out, H', W'); weight (C_out, C_in / groups, kh, kw), bias (C_out).
    # stride (sh, sw), pads (top, left, bottom, right), dilation (dh, dw), groups.
    "conv2d": (1, ("weight", "bias"), ("stride", "pads", "dilation", "groups")),
    # (..., K) -> (..., N); weight (K, N), bias (N).
    "matmul": (1, ("weight", "bias"), ()),
    # x * scale + shift; both broadcast against (1, ...) i.e. have the rank of the activation with batch axis 1.
    "affine": (1, ("scale", "shift"), ()),
    # x + addend, which has the activation's rank with batch axis 1.
    "shift": (1, ("addend",), ()),
    # Two activations of one rank; axes of 1 broadcast.
    "add": (2, (), ()),
    "sub": (2, (), ()),
    "mul": (2, (), ()),
    # (..., M, K) by (..., K, N) -> (..., M, N); leading axes broadcast.
    "dot": (2, (), ()),
    # x * factor + offset, both public.
    "scale": (1, (), ("factor", "offset")),
    "relu": (1, (), ()),
    # Piecewise quadratic, as `protocols.program.pieces.Pieces`; the result is truncated to keep_bits fraction bits if
    # it has more. With frac_bits 0 it is a truth value or a count.
    "spline": (1, (), ("knots", "coefficients", "frac_bits", "keep_bits")),
    # The same of two scales, as `protocols.program.pieces.WidePieces`.
    "wide_spline": (
        1,
        (),
        ("knots", "coefficients", "frac_bits", "low_coefficients", "low_frac_bits", "finer", "keep_bits"),
    ),
    # axis counted with the batch, not 0; it stays with size 1. last 0 or 1: which of equals wins.
    "max": (1, (), ("axis",)),
    "argmax": (1, (), ("axis", "last")),
    # (..., C, H, W) -> (..., C, H', W'); kernel (kh, kw), stride, pads as in conv2d; padding never wins the maximum.
    "max_pool2d": (1, (), ("kernel", "stride", "pads")),
    # The same with the mean; count_include_pad 0 or 1.
    "avg_pool2d": (1, (), ("kernel", "stride", "pads", "count_include_pad")),
    # The same with the sum.
    "sum_pool2d": (1, (), ("kernel", "stride", "pads")),
    # axes counted with the batch as axis 0 (never 0 itself), keepdims 0 or 1.
    "mean": (1, (), ("axes", "keepdims")),
    # The same without the division.
    "sum": (1, (), ("axes", "keepdims")),
    # (n x - sum of x over axes) / 2**floor(log2 n) for the n values of those axes: their distances from their mean,
    # times a public number of 1 to 2, with no constant that could err.
    "deviation": (1, (), ("axes",)),
    # shape of one sample after it.
    "reshape": (1, (), ("shape",)),
    # perm counted with the batch, perm[0] == 0.
    "transpose": (1, (), ("perm",)),
    # axis counted with the batch, not 0.
    "concat": (None, (), ("axis",)),
    # Chosen places of one axis, counted with the batch and not 0; -1 stands for the public number fill.
    "take": (1, (), ("axis", "indices", "fill")),
    # Axes of one repeated: shape of one sample after it, of the same rank.
    "expand": (1, (), ("shape",)),
}
# Those whose results cost comparisons, and with them most of a prediction's memory.
COMPARISONS = {"relu", "spline", "wide_spline", "max", "argmax", "max_pool2d"}
# Fraction bits of a weight or scale: as many as other values have, and at most so many more.


@dataclass(frozen=True)
class Layer:
    """One operation: `output = op(inputs; params, attrs)`.

    Args:
        op: a name of `OPERATORS`.
        name: the node's name, for messages and cost tables; unique in its program.
        inputs: names of earlier outputs or of the program's inputs.
        output: name of the value it makes.
        shape: shape of that value for one sample, without the batch axis.
        params: role -> name of a parameter; the value lies with the keeper.
        attrs: public attributes, as `OPERATORS` lists them.
        weight_bits: fraction bits of the parameter "weight" or "scale", of an operator that has one; "bias" or "shift"
            has FRAC_BITS more. Public; more than FRAC_BITS where weights are small.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    shape: Shape
    params: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Attribute] = field(default_factory=dict)
    weight_bits: int = FRAC_BITS

    def bits_of_weight(self, comparison_bits: int) -> int:
        """Return `weight_bits`, or as many as leave room for every product that comparisons on k bits decide."""
        return min(self.weight_bits, LIMIT_BITS - comparison_bits)

    def ints(self, name: str) -> tuple[int, ...]:
        """Return an attribute that must be a tuple of integers."""
        value = self.attrs[name]
        if not isinstance(value, tuple):
            raise IntegrityError(f"layer {self.name!r}: {name} must be a tuple of integers; got {value!r}")
        return value

    def number(self, name: str) -> float:
        """Return an attribute that must be a number."""
        value = self.attrs[name]
        if not isinstance(value, int | float):
            raise IntegrityError(f"layer {self.name!r}: {name} must be a number; got {value!r}")
        return value


@dataclass(frozen=True)
class Program:
    """A network without its weights.

    Args:
        inputs: name -> shape of one sample.
        outputs: names of the values that are revealed, in the model's order.
        layers: in an order in which every input is made before it is used.
        params: name -> shape of each parameter.
        whole: whether one sample is the whole of the model's inputs: a prediction then takes exactly one, and the
            batch axis is not the model's.
    """

    inputs: Mapping[str, Shape]
    outputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    params: Mapping[str, Shape]
    whole: bool = False

    def shape(self, value: str) -> Shape:
        """Return the shape of one sample of an input or of a layer's output."""
        if value in self.inputs:
            return self.inputs[value]
        return next(layer.shape for layer in self.layers if layer.output == value)

    def to_json(self) -> str:
        """Return the program as JSON text, the form in which it travels."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Program":
        """Read what `to_json` wrote; raise IntegrityError for anything that is not a program."""
        try:
            raw = json.loads(text)
            layers = tuple(
                Layer(
                    op=str(x["op"]),
                    name=str(x["name"]),
                    inputs=tuple(map(str, x["inputs"])),
                    output=str(x["output"]),
                    shape=tuple(map(int, x["shape"])),
                    params={str(k): str(v) for k, v in x["params"].items()},
                    attrs={str(k): tuple(v) if isinstance(v, list) else v for k, v in x["attrs"].items()},
                    weight_bits=int(x["weight_bits"]),
                )
                for x in raw["layers"]
            )
            program = cls(
                inputs={str(k): tuple(map(int, v)) for k, v in raw["inputs"].items()},
                outputs=tuple(map(str, raw["outputs"])),
                layers=layers,
                params={str(k): tuple(map(int, v)) for k, v in raw["params"].items()},
                whole=bool(raw["whole"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"a program must be JSON as to_json writes it; {type(error).__name__}") from None
        program.validate()
        return program

    def validate(self) -> None:
        """Raise IntegrityError unless every layer is known, complete and in order."""
        known = set(self.inputs)
        names: set[str] = set()
        for layer in self.layers:
            if layer.op not in OPERATORS:
                raise IntegrityError(f"layer {layer.name!r}: operator must be one of ours; got {layer.op!r}")
            n_inputs, params, attrs = OPERATORS[layer.op]
            if n_inputs is not None and len(layer.inputs) != n_inputs:
                raise IntegrityError(
                    f"layer {layer.name!r}: {layer.op} takes {n_inputs} inputs; got {len(layer.inputs)}"
                )
            if set(layer.params) != set(params) or set(layer.attrs) != set(attrs):
                raise IntegrityError(f"layer {layer.name!r}: {layer.op} takes {params} and {attrs}")
            if not FEWEST_WEIGHT_BITS <= layer.weight_bits <= MOST_WEIGHT_BITS:
                raise IntegrityError(
                    f"layer {layer.name!r}: weight_bits must lie in {FEWEST_WEIGHT_BITS}..{MOST_WEIGHT_BITS}; "
                    f"got {layer.weight_bits}"
                )
            if not known.issuperset(layer.inputs) or not set(self.params).issuperset(layer.params.values()):
                raise IntegrityError(f"layer {layer.name!r} uses a value or parameter that nobody made")
            if layer.output in known or layer.name in names:
                raise IntegrityError(f"layer {layer.name!r}: names and outputs must be unique")
            known.add(layer.output)
            names.add(layer.name)
        if not self.outputs or not known.issuperset(self.outputs):
            raise IntegrityError("every output of a program must be made by one of its layers")


def chunk_size(program: Program, batch: int, elements: int) -> int:
    """Return how many samples of a batch one run of a program takes, so that its memory stays bounded.

    Args:
        program: the network.
        batch: number of samples.
        elements: comparisons that one run may hold, counted as elements of the results of the layers that compare.
    """
    compared = sum(math.prod(layer.shape) for layer in program.layers if layer.op in COMPARISONS)
    return max(1, min(batch, elements // max(compared, 1)))
