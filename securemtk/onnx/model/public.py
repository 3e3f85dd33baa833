"""Which inputs of a model are public: those that only ever say shapes, axes, counts, places or what is computed.

The exporters write them into the file; a file may also ask for them at run time, as the standard's own tests do. What
is computed must be known to both parties before it is computed on secrets, so that they are given in the clear.
"""

from collections.abc import Mapping

from onnx import ModelProto, NodeProto

from securemtk.onnx.model.reading import captured

# Operator -> positions of the inputs that say shapes, axes, counts or places, or what is computed as an attribute
# would (the exponent of a power, the mode of a Dropout), in any opset.
POSITIONS: Mapping[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "Compress": (1,),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "Gather": (1,),
    "GatherElements": (1,),
    "GatherND": (1,),
    "MaxUnpool": (2,),
    "OneHot": (1, 2),
    "Pad": (1, 2, 3),
    "Pow": (1,),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "ReverseSequence": (1,),
    "ScatterElements": (1,),
    "ScatterND": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1, 2),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
# An embedding's places are what a user looks up; only in computed data are they part of the model.
_LOOKUPS = {"Gather", "GatherElements", "GatherND"}


def public_inputs(model: ModelProto) -> tuple[str, ...]:
    """Return the names of the inputs that are used at `POSITIONS` of operators and nowhere else.

    An input also counts when nodes stand between that only such positions use, as a Cast before a Reshape.

    Args:
        model: as `securemtk.onnx.model.reading.read_proto` returns it; its nodes are in order.

    Returns:
        Names in the model's order; an input that no node uses is not among them.
    """
    constant = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if constant.issuperset(x for x in node.input if x):
            constant |= set(node.output)
    secret = {x.name for x in model.graph.output}
    used: set[str] = set()
    for node in reversed(model.graph.node):
        used |= {*node.input, *captured(node)}
        secret |= captured(node)
        if not secret.isdisjoint(node.output):
            public = _positions(node, constant)
            secret |= {x for i, x in enumerate(node.input) if i not in public}
    return tuple(x.name for x in model.graph.input if x.name in used - secret - constant)


def _positions(node: NodeProto, constant: set[str]) -> tuple[int, ...]:
    if node.domain or (node.op_type in _LOOKUPS and node.input[0] in constant):
        return ()
    return POSITIONS.get(node.op_type, ())
