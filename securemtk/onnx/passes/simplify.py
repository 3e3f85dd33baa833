"""Passes that leave every parameter as it is: fewer steps, or the same steps in a cheaper order.

The first line of a pass's docstring is its row in docs/onnx.md: what it does; what it saves.
"""

import math
from dataclasses import replace

from securemtk.onnx.building.registry import LIMIT, Step
from securemtk.onnx.passes.net import Net, join_pairs


def shorten_reshapes(net: Net) -> Net:
    """Identities (`Identity`, `Dropout`, `Cast`, empty `Pad`) and reshapes that change nothing go; chains become one; \
fewer steps."""
    alias: dict[str, str] = {}
    shapes = dict(net.inputs)
    reshaped: dict[str, str] = {}
    kept: list[Step] = []
    for step in net.steps:
        step = replace(step, inputs=tuple(alias.get(x, x) for x in step.inputs))
        shapes[step.output] = step.shape
        if step.op == "reshape":
            source = reshaped.get(step.inputs[0], step.inputs[0])
            reshaped[step.output] = source
            step = replace(step, inputs=(source,), op="identity" if shapes[source] == step.shape else "reshape")
        if step.op == "identity" and step.output not in net.outputs:
            alias[step.output] = step.inputs[0]
            reshaped.pop(step.output, None)
        else:
            kept.append(step)
    return _name_outputs(net.having(kept))


def _name_outputs(net: Net) -> Net:
    """Give a value that is an output under another name that name; a second name is a reshape, which costs nothing."""
    names: dict[str, str] = {}
    kept: list[Step] = []
    for step in net.steps:
        source = step.inputs[0]
        if step.op == "identity" and source not in net.inputs and source not in net.outputs and source not in names:
            names[source] = step.output
        elif step.op == "identity":
            kept.append(replace(step, op="reshape", attrs={"shape": step.shape}))
        else:
            kept.append(step)
    return net.having(
        [
            replace(s, inputs=tuple(names.get(x, x) for x in s.inputs), output=names.get(s.output, s.output))
            for s in kept
        ]
    )


def join_transposes(net: Net) -> Net:
    """Transposes in a row become one, and one that only moves axes of size 1 a reshape; fewer steps."""
    shapes = net.shapes()
    made: dict[str, Step] = {}
    for step in net.steps:
        if step.op == "transpose":
            perm, source = step.ints("perm"), made.get(step.inputs[0])
            if source is not None and source.op == "transpose":
                inner = source.ints("perm")
                perm = tuple(inner[i] for i in perm)
                step = replace(step, inputs=source.inputs, attrs={"perm": perm})
            moved = [i for i in perm if i and shapes[step.inputs[0]][i - 1] > 1]
            if moved == sorted(moved):
                step = replace(step, op="reshape", attrs={"shape": step.shape})
        made[step.output] = step
    return net.having(list(made.values()))


def drop_dead(net: Net) -> Net:
    """Steps whose results nothing uses go; all that they cost."""
    wanted = set(net.outputs)
    kept: list[Step] = []
    for step in reversed(net.steps):
        if step.output in wanted:
            kept.append(step)
            wanted.update(step.inputs)
    return net.having(kept[::-1])


def join_clips(net: Net) -> Net:
    """`Relu` and `Clip` in a row become one of them; 2 rounds."""
    return join_pairs(net, _join_clips)


def _join_clips(before: Step, step: Step) -> list[Step] | None:
    if before.op not in _CLIPS or step.op not in _CLIPS:
        return None
    (low, high), (least, most) = _bounds(before), _bounds(step)
    low, high = (min(max(x, least), most) for x in (low, high))
    attrs = {} if (low, high) == (0.0, LIMIT) else {"low": low, "high": high}
    return [replace(step, op="clip" if attrs else "relu", inputs=before.inputs, attrs=attrs)]


_CLIPS = ("relu", "clip")


def _bounds(step: Step) -> tuple[float, float]:
    return (0.0, LIMIT) if step.op == "relu" else (step.number("low"), step.number("high"))


# Functions that never decrease: the maximum of their values is their value at the maximum.
_MONOTONE = ("relu", "clip", "sigmoid", "tanh")


def pool_first(net: Net) -> Net:
    """A maximum over windows, with a reshape for it, moves before a monotone function (`Relu`, `Clip`, `Sigmoid`, \
`Tanh`) that only it uses; the function works on fewer elements."""

    def rule(before: Step, step: Step) -> list[Step] | None:
        users = net.users(step.output)
        pool = step.op == "max_pool2d" or (step.op == "reshape" and [x.op for x in users] == ["max_pool2d"])
        if not pool or before.op not in _MONOTONE or (step.op == "reshape" and step.output in net.outputs):
            return None
        first = replace(step, inputs=before.inputs, output=before.output)
        return [first, replace(before, inputs=(before.output,), output=step.output, shape=step.shape)]

    return join_pairs(net, rule)


def exact_differences(net: Net) -> Net:
    """A difference of values from their own mean over axes that stay becomes one step, in which no constant errs, \
however large the mean is; a round where the mean would be truncated."""
    makers = {step.output: step for step in net.steps}
    kept: list[Step] = []
    for step in net.steps:
        mean = makers.get(step.inputs[1]) if step.op == "sub" else None
        value = step.inputs[0]
        if mean is None or mean.op != "mean" or mean.inputs != (value,) or not mean.number("keepdims"):
            kept.append(step)
            continue
        # The mean has axes of 1 in its value's shape: the difference has that shape itself.
        axes = mean.ints("axes")
        n = math.prod(step.shape[a - 1] for a in axes)
        less = 2.0 ** (n.bit_length() - 1) / n
        output = step.output if less == 1.0 else f"{step.output}/times"
        kept.append(Step("deviation", step.name, (value,), output, step.shape, attrs={"axes": axes}))
        if less != 1.0:
            attrs = {"factor": less, "offset": 0.0}
            kept.append(Step("scale", f"{step.name}/scale", (output,), step.output, step.shape, attrs=attrs))
    return net.having(kept)


# What each of them makes has still to be truncated; a comparison does so by itself.
_LINEAR = ("conv2d", "matmul", "affine")
_ELEMENTWISE = (*_MONOTONE, "leaky_relu")


def join_first(net: Net) -> Net:
    """`Concat` of one function (`Relu`, `LeakyRelu`, `Clip`, `Sigmoid`, `Tanh`) of several linear layers' results, \
which nothing else uses, becomes the function of their `Concat`; the rounds of all functions but one."""
    while (joined := _join_one(net)) is not None:
        net = joined
    return net


def _join_one(net: Net) -> Net | None:
    makers, uses = {step.output: step for step in net.steps}, net.uses()
    for step in net.steps:
        parts = [makers[x] for x in step.inputs if x in makers and uses[x] == 1]
        sources = [makers[x] for part in parts for x in part.inputs if x in makers]
        alike = all((x.op, x.attrs) == (parts[0].op, parts[0].attrs) for x in parts)
        if (
            step.op == "concat"
            and len(parts) == len(sources) == len(step.inputs)
            and alike
            and parts[0].op in _ELEMENTWISE
            and all(x.op in _LINEAR and uses[x.output] == 1 for x in sources)
        ):
            name = parts[0].output
            joined = replace(step, inputs=tuple(x.output for x in sources), output=name)
            function = replace(parts[0], inputs=(name,), output=step.output, shape=step.shape)
            kept = [x for x in net.steps if not any(x is part for part in parts)]
            at = next(i for i, x in enumerate(kept) if x is step)
            return net.having([*kept[:at], joined, function, *kept[at + 1 :]])
    return None


def share_equal(net: Net) -> Net:
    """A step without parameters that does to the same values what one before it did goes; all that it costs."""
    first: dict[str, str] = {}
    kept: list[Step] = []
    for step in net.steps:
        key = repr((step.op, step.inputs, step.shape, sorted(step.attrs.items())))
        named = step.op in ("reshape", "identity") and step.output in net.outputs
        if not step.params and not named and first.setdefault(key, step.output) != step.output:
            step = replace(step, op="identity", inputs=(first[key],), attrs={})
        kept.append(step)
    return net.having(kept)
