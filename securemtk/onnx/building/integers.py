"""What stays whole: of integers onnxruntime cuts off every fraction and wraps what its type does not hold.

Fixed point does neither. So a rule whose mathematics makes fractions is refused where its result is of integers, and a
cast is where a number may not fit its new type; whatever is not known to stay whole counts as making fractions.
"""

import math
from typing import Any

import numpy as np

from securemtk.onnx.building.registry import Refused, constant_input
from securemtk.onnx.model.graph import Graph, Node

# Integers of these are moved, chosen, counted, summed or multiplied.
# fmt: off
_WHOLE = frozenset((
    "Abs", "Add", "ArgMax", "ArgMin", "Cast", "CastLike", "Ceil", "Clip", "Concat", "CumSum", "DepthToSpace", "Einsum",
    "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "GlobalMaxPool", "Identity", "MatMul", "Max",
    "MaxPool", "Min", "Mul", "Neg", "PRelu", "Pad", "ReduceL1", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Relu", "Reshape", "Round", "Sign", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sub", "Sum",
    "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
))
# Of these the result may be larger than what they are given.
_GROW = frozenset((
    "Abs", "Add", "CumSum", "Einsum", "Gemm", "MatMul", "Mul", "Neg", "PRelu", "Pow", "ReduceL1", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Sub", "Sum",
))
# fmt: on
# What only moves or chooses values of its first input.
_MOVES = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Cast", "CastLike")
# Fixed point holds no number that these do not, but for those below 0 of a type without a sign.
_WIDE_BITS = 32


def require_whole(node: Node, graph: Graph) -> None:
    """Raise Refused where a node's result is of integers, and the numbers that its rule makes may be none of them."""
    dtype = np.dtype(graph.dtypes.get(node.outputs[0], "float32"))
    if dtype.kind not in "iu":
        return
    if node.op_type in ("Cast", "CastLike"):
        _require_room(node, graph, dtype)
    elif node.op_type not in (*_WHOLE, "Div") and not _is_whole(node, graph):
        # Of further outputs the first one is what a node is about.
        raise Refused(
            f"{node.op_type} of integers makes fractions, which {dtype} cuts off", "cast its input to float32"
        )
    narrow = dtype.itemsize * 8 < _WIDE_BITS and (node.op_type, dtype.kind) != ("Abs", "u")
    if (node.op_type in _GROW and narrow) or (node.op_type == "Sub" and dtype.kind == "u"):
        raise Refused(f"{node.op_type} of {dtype} wraps what that does not hold", "cast its input to int32")


def _is_whole(node: Node, graph: Graph) -> bool:
    """Return whether a node's attributes and constants are such that no fractions come about."""
    if node.op_type == "Pow":
        if node.input(0) not in graph.activations:
            return False
        exponents = constant_input(node, graph, 1, "the exponent")
        return bool((exponents >= 0).all() and not (exponents % 1).any())
    if node.op_type in ("Resize", "Upsample"):
        fill = float(node.attrs.get("extrapolation_value", 0.0))
        return node.attrs.get("mode", "nearest") == "nearest" and fill.is_integer()
    if node.op_type == "Gemm":
        return all(float(node.attrs.get(name, 1.0)).is_integer() for name in ("alpha", "beta"))
    return False


def _require_room(node: Node, graph: Graph, dtype: np.dtype[Any]) -> None:
    """Refuse a cast to a type that wraps what its input may hold."""
    limits = np.iinfo(dtype)
    low, high = _bounds(node.input(0), graph)
    if low < 0 <= limits.min or (limits.bits < _WIDE_BITS and not limits.min <= low <= high <= limits.max):
        raise Refused(f"a cast to {dtype} wraps numbers that it does not hold", "cast to int64")


def _bounds(name: str, graph: Graph) -> tuple[float, float]:
    """Return the least and the greatest number that a value can hold by its type, or as the place of an extreme."""
    dtype = np.dtype(graph.dtypes.get(name, "float32"))
    bounds = (-math.inf, math.inf)
    if dtype.kind == "b":
        return 0, 1
    if dtype.kind in "iu":
        bounds = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
    maker = next((n for n in graph.nodes if name in n.outputs and not n.domain), None)
    if maker is None:
        return bounds
    if maker.op_type in _MOVES:
        low, high = _bounds(maker.input(0), graph)
        return max(low, bounds[0]), min(high, bounds[1])
    if maker.op_type in ("ArgMax", "ArgMin") and maker.input(0) in graph.seen:
        return 0, max(graph.seen[maker.input(0)], default=1) - 1
    return bounds
