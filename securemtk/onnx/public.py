"""Inputs of a model that only say shapes, axes, counts or places: they are taken in the clear.

Such an input decides how the computation looks, which both parties must know. Whoever runs the model is told so.
"""

from onnx import ModelProto

# Operator -> positions of inputs that say how the others are treated.
POSITIONS: dict[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Split": (1,),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "Gather": (1,),
    "GatherElements": (1,),
    "GatherND": (1,),
    "TopK": (1,),
    "CumSum": (1,),
    "Trilu": (1,),
    "OneHot": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    **{
        f"Reduce{kind}": (1,)
        for kind in ("Sum", "Mean", "Max", "Min", "L1", "L2", "LogSum", "LogSumExp", "Prod", "SumSquare")
    },
}


def public_inputs(model: ModelProto) -> tuple[str, ...]:
    """Return the names of the inputs that some node uses at such a position, in the model's order."""
    wanted = {
        name
        for node in model.graph.node
        if node.domain == ""
        for i, name in enumerate(node.input)
        if i in POSITIONS.get(node.op_type, ())
    }
    weights = {t.name for t in model.graph.initializer}
    return tuple(x.name for x in model.graph.input if x.name in wanted and x.name not in weights)
