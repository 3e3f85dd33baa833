"""Make a list of steps shorter without changing what it computes, and without looking at a weight's value.

Which layers a program has is public, so whether two layers become one depends on shapes alone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from protocols.program import Shape
from securemtk.onnx.registry import Step


@np.errstate(all="ignore")
def tidy(steps: Sequence[Step], inputs: Mapping[str, Shape], outputs: Sequence[str]) -> list[Step]:
    """Return steps without identities, chains of reshapes, foldable affine steps and steps that nothing uses.

    Args:
        steps: as `translate` returns them.
        inputs: shape of one sample of each input of the model.
        outputs: names that must still be made.
    """
    steps = _name_outputs(_shorten_reshapes(steps, inputs, outputs), inputs, outputs)
    return _pool_first(_fold_affine(_alive(steps, outputs), outputs), outputs)


def _shorten_reshapes(steps: Sequence[Step], inputs: Mapping[str, Shape], outputs: Sequence[str]) -> list[Step]:
    """Let each reshape start from the value before the reshapes before it; drop identities and what becomes one."""
    alias: dict[str, str] = {}
    shapes = dict(inputs)
    reshaped: dict[str, str] = {}
    kept: list[Step] = []
    for step in steps:
        step = replace(step, inputs=tuple(alias.get(x, x) for x in step.inputs))
        shapes[step.output] = step.shape
        if step.op == "reshape":
            source = reshaped.get(step.inputs[0], step.inputs[0])
            reshaped[step.output] = source
            step = replace(step, inputs=(source,), op="identity" if shapes.get(source) == step.shape else "reshape")
        if step.op == "identity" and step.output not in outputs:
            alias[step.output] = step.inputs[0]
            reshaped.pop(step.output, None)
        else:
            kept.append(step)
    return kept


def _name_outputs(steps: Sequence[Step], inputs: Mapping[str, Shape], outputs: Sequence[str]) -> list[Step]:
    """Give a value that is an output under another name that name; a second name is a reshape, which costs nothing."""
    names: dict[str, str] = {}
    kept: list[Step] = []
    for step in steps:
        source = step.inputs[0] if step.inputs else ""
        if step.op == "identity" and source not in inputs and source not in outputs and source not in names:
            names[source] = step.output
        elif step.op == "identity":
            kept.append(replace(step, op="reshape", attrs={"shape": step.shape}))
        else:
            kept.append(step)
    return [
        replace(step, inputs=tuple(names.get(x, x) for x in step.inputs), output=names.get(step.output, step.output))
        for step in kept
    ]


def _alive(steps: Sequence[Step], outputs: Sequence[str]) -> list[Step]:
    wanted = set(outputs)
    kept: list[Step] = []
    for step in reversed(steps):
        if step.output in wanted:
            kept.append(step)
            wanted.update(step.inputs)
    return kept[::-1]


def _fold_affine(steps: Sequence[Step], outputs: Sequence[str]) -> list[Step]:
    """Fold x * scale + shift into the convolution, product or affine step that made x, when nothing else uses x.

    An affine step *before* a convolution stays: its shift does not fold at a padded border, and a small scale (1 / 255
    for an image) would leave few of the 16 fraction bits to the weights.
    """
    uses = Counter(x for step in steps for x in step.inputs) + Counter(outputs)
    kept: dict[str, Step] = {}
    for step in steps:
        before = kept.get(step.inputs[0])
        if step.op == "affine" and before is not None and uses[before.output] == 1 and _is_foldable(before, step):
            del kept[before.output]
            kept[step.output] = _fold(before, step)
        else:
            kept[step.output] = step
    return list(kept.values())


def _is_foldable(before: Step, affine: Step) -> bool:
    if before.op == "affine":
        return True
    if before.op not in ("conv2d", "matmul"):
        return False
    axis = 1 if before.op == "conv2d" else len(before.shape)
    return all(n == 1 for v in affine.params.values() for i, n in enumerate(v.shape) if i != axis)


def _fold(before: Step, affine: Step) -> Step:
    scale, shift = affine.params["scale"], affine.params["shift"]
    if before.op == "affine":
        params = {"scale": before.params["scale"] * scale, "shift": before.params["shift"] * scale + shift}
    else:
        weight, bias = before.params["weight"], before.params["bias"]
        scale, shift = np.broadcast_to(scale.ravel(), bias.shape), np.broadcast_to(shift.ravel(), bias.shape)
        form = (-1, 1, 1, 1) if before.op == "conv2d" else (1, -1)
        params = {"weight": weight * scale.reshape(form), "bias": bias * scale + shift}
    return replace(before, output=affine.output, shape=affine.shape, params=params)


# Functions that never decrease: the maximum of their values is their value at the maximum.
_MONOTONE = ("relu", "clip", "sigmoid", "tanh")


def _pool_first(steps: Sequence[Step], outputs: Sequence[str]) -> list[Step]:
    """Take the maximum before a monotone function that only the maximum uses: a quarter of its comparisons remain."""
    uses = Counter(x for step in steps for x in step.inputs) + Counter(outputs)
    kept: dict[str, Step] = {}
    for step in steps:
        before = kept.get(step.inputs[0])
        if step.op == "max_pool2d" and before is not None and before.op in _MONOTONE and uses[before.output] == 1:
            del kept[before.output]
            kept[before.output] = replace(step, inputs=before.inputs, output=before.output)
            kept[step.output] = replace(before, inputs=(before.output,), output=step.output, shape=step.shape)
        else:
            kept[step.output] = step
    return list(kept.values())
