"""All passes over a model's steps, run until none of them changes anything.

Which layers a program has is public, so whether a pass applies depends on shapes and on structure, never on a weight's
value.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from protocols.program.program import Shape
from securemtk.onnx.building.registry import Step
from securemtk.onnx.passes import formulas, logs, merge, simplify, steep
from securemtk.onnx.passes.net import Net, Pass

# Before any other pass changes how a formula is written; identities within it are in the way.
FORMULAS: tuple[Pass, ...] = (
    simplify.shorten_reshapes,
    logs.logarithms,
    formulas.known_functions,
    steep.large_factors,
)
SIMPLIFY: tuple[Pass, ...] = (
    simplify.shorten_reshapes,
    simplify.join_transposes,
    simplify.exact_differences,
    simplify.drop_dead,
    simplify.join_clips,
    simplify.pool_first,
    simplify.join_first,
)
MERGE: tuple[Pass, ...] = (
    merge.affine_into_previous,
    merge.affine_before_reshape,
    merge.linear_into_linear,
    merge.parallel_linears,
    merge.affine_into_next,
    merge.sum_for_mean,
)


# What overflows or is not a number is found, by its name, when parameters are checked.
@np.errstate(all="ignore")
def run_passes(
    steps: Sequence[Step], inputs: Mapping[str, Shape], outputs: Sequence[str], *, merging: bool = True
) -> list[Step]:
    """Return steps that compute the same in fewer rounds.

    Args:
        steps: as `translate` returns them.
        inputs: shape of one sample of each input of the model.
        outputs: names that must still be made.
        merging: whether passes may compute new parameters.
    """
    passes = FORMULAS + SIMPLIFY + MERGE * merging
    net = settle(Net(tuple(steps), inputs, tuple(outputs)), passes)
    # Last: a value that two steps share is in the way of passes that need it for themselves.
    return list(settle(net, (*passes, simplify.share_equal)).steps)


def settle(net: Net, passes: Sequence[Pass]) -> Net:
    """Apply passes in their order, again and again, until the net stays as it is."""
    while True:
        before = net.layout()
        for each in passes:
            net = each(net)
        if net.layout() == before:
            return net


def pass_table() -> str:
    """Return the passes as a Markdown table, the one in docs/onnx.md."""
    rows = []
    for each in (*FORMULAS[1:], *SIMPLIFY, simplify.share_equal, *MERGE):
        what, saved = " ".join((each.__doc__ or "").split("\n\n")[0].split()).removesuffix(".").rsplit("; ", 1)
        rows.append(f"| `{each.__name__}` | {what}. | {saved} |")
    return "\n".join(["| pass | what it does | what it saves |", "| --- | --- | --- |", *rows])
