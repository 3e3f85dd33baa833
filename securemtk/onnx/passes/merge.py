"""Passes that compute new parameters, in float64: linear maps in a row, or side by side, become one.

Each linear map costs a round, 8 bytes for each element of its input, and in most places a truncation (a round) before
it. The first line of a pass's docstring is its row in docs/onnx.md: what it does; what it saves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from protocols.program.program import Attribute, Shape
from securemtk.onnx.building.registry import Step, param
from securemtk.onnx.model.graph import Array
from securemtk.onnx.passes.net import Net, join_pairs, renamed

LINEAR = ("conv2d", "matmul")
# A merge may cost this many products for each sample, and this many weights, more: less time than the rounds it saves.
_MORE = 1 << 16
# 1 / n in the weights leaves them log2(n) bits less; with K weights for each element of the result, the error for
# inputs of size 1 has a standard deviation of n * sqrt(K) * 2**-17 / sqrt(3), here at most 0.0006.
_PRECISE = 128
# A public factor below this stays a step of its own: in the weights it would leave them fewer than 12 of 16 bits.
_LEAST_FACTOR = 1 / 16


def _axis(step: Step) -> int:
    """Return the axis of a convolution's or product's channels, in input and output."""
    return len(step.shape) - 2 if step.op == "conv2d" else len(step.shape)


def _products(step: Step) -> int:
    """Return the multiplications for one sample."""
    if step.op == "conv2d":
        return math.prod(_places(step)) * step.params["weight"].size
    return math.prod(step.shape[:-1]) * step.params["weight"].size if step.op == "matmul" else 0


def _places(conv: Step) -> Shape:
    """Return the shape of a convolution's result for one sample but for its channels: (..., H, W)."""
    return (*conv.shape[:-3], *conv.shape[-2:])


def _weights(step: Step) -> int:
    return step.params["weight"].size if step.op in LINEAR else 0


def _pays(parts: Sequence[Step], products: int, weights: int) -> bool:
    """Return whether one layer is worth more than its parts."""
    return products <= sum(map(_products, parts)) + _MORE and weights <= 2 * sum(map(_weights, parts)) + _MORE


# --- affine ---------------------------------------------------------------------------------------------------------


def affine_into_previous(net: Net) -> Net:
    """An affine layer (batch normalisation; a sum, difference, product or quotient with a number) goes into the \
affine layer, or if it has a number for each channel, into the convolution or product before it that only it uses; \
2 rounds, none for a sum alone."""
    return join_pairs(net, _into_previous)


def _as_affine(step: Step) -> Step:
    """Return a product with a public number, and the sum with one, as an affine layer; any other step as it is."""
    if step.op != "scale" or abs(step.number("factor")) < _LEAST_FACTOR:
        return step
    each = (1,) * (len(step.shape) + 1)
    params = {"scale": np.full(each, step.number("factor")), "shift": np.full(each, step.number("offset"))}
    return replace(step, op="affine", params=params, attrs={})


def _into_previous(before: Step, affine: Step) -> list[Step] | None:
    # A sum with the keeper's numbers is free, and so is a public factor behind it.
    if before.op != "affine" or "scale" in before.params:
        affine = _as_affine(affine)
    if affine.op != "affine" or not (before.op == "affine" or _folds(before, affine)):
        return None
    scale, shift = param(affine, "scale"), param(affine, "shift")
    params = dict(before.params)
    if before.op == "affine":
        if "scale" in affine.params or "scale" in params:
            params["scale"] = param(before, "scale") * scale
        if "shift" in affine.params or "shift" in params:
            params["shift"] = param(before, "shift") * scale + shift
    else:
        bias = param(before, "bias")
        scale, shift = np.broadcast_to(scale.ravel(), bias.shape), np.broadcast_to(shift.ravel(), bias.shape)
        if "shift" in affine.params or "bias" in params:
            params["bias"] = bias * scale + shift
        params["weight"] = params["weight"] * scale.reshape((-1, 1, 1, 1) if before.op == "conv2d" else (1, -1))
    return [replace(before, output=affine.output, shape=affine.shape, params=params)]


def _folds(before: Step, affine: Step) -> bool:
    return before.op in LINEAR and all(_is_channelwise(v, _axis(before)) for v in affine.params.values())


def _is_channelwise(value: Array, axis: int) -> bool:
    return all(n == 1 for i, n in enumerate(value.shape) if i != axis)


def affine_before_reshape(net: Net) -> Net:
    """An affine layer moves before reshapes, transposes and cuts behind a convolution or product, if it then goes \
into that one; 2 rounds, none for a sum alone."""
    makers, uses, shapes = {step.output: step for step in net.steps}, net.uses(), net.shapes()
    for affine in map(_as_affine, net.steps):
        if affine.op != "affine" or shapes[affine.inputs[0]] != affine.shape:
            continue
        moved, path = affine, [affine]
        while (maker := makers.get(moved.inputs[0])) is not None and uses[maker.output] == 1:
            if len(path) > 1 and _folds(maker, moved):
                return affine_before_reshape(_moved_to_front(net, moved, path))
            if maker.op not in ("reshape", "transpose", "take"):
                break
            source = shapes[maker.inputs[0]]
            earlier = {k: _before(maker, source, v) for k, v in moved.params.items()}
            params = {k: v for k, v in earlier.items() if v is not None}
            if len(params) < len(earlier):
                break
            moved = replace(moved, inputs=maker.inputs, shape=source, params=params)
            path.append(maker)
    return net


def _moved_to_front(net: Net, moved: Step, path: Sequence[Step]) -> Net:
    """Return the net with `moved` in place of the first of the steps (last one first) and each of them one further."""
    changed = {path[-1].output: replace(moved, output=path[-1].output)}
    for step, behind in zip(path[1:], path, strict=False):
        changed[behind.output] = replace(step, inputs=(step.output,), output=behind.output)
    return net.having([changed.get(step.output, step) for step in net.steps])


def _before(step: Step, source: Shape, value: Array) -> Array | None:
    """Return what broadcasts to a reshape's, transpose's or take's input, of shape `source`, as `value` to its result.

    None when nothing does.
    """
    if step.op == "transpose":
        return value.transpose(np.argsort(step.ints("perm")))
    if step.op == "reshape":
        return _reshaped(value, step.shape, source)
    # Numbers that a take has put in would be changed by a shift.
    same = value.shape[int(step.number("axis"))] == 1 and min(step.ints("indices")) >= 0
    return value if same else None


def _reshaped(value: Array, shape: Shape, new: Shape) -> Array:
    """Return what broadcasts against samples of the `new` shape as `value` does against `shape`.

    It stays as small as may be: an axis, or axes that become others, over which it is the same keep the size 1.
    """
    wide, form = [1], [1]
    for old, axes in _regrouped(shape, new):
        have = [value.shape[1 + i] for i in old]
        sizes = [shape[i] for i in old]
        same = all(n == 1 for n in have)
        wide += have if same else sizes
        form += [1 if same else new[i] for i in axes]
    return np.broadcast_to(value, wide).reshape(form)


def _regrouped(shape: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of axes in a row that a reshape makes of each other."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(new):
        old, axes = i, j
        i, j = min(i + 1, len(shape)), min(j + 1, len(new))
        while (a := math.prod(shape[old:i])) != (b := math.prod(new[axes:j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        groups.append((list(range(old, i)), list(range(axes, j))))
    return groups


def affine_into_next(net: Net) -> Net:
    """An affine layer goes into the convolutions and products behind it, if nothing else uses it, reshapes and \
transposes between them included; not a shift into a padded convolution, and not an affine layer on an input of the \
model (1 / 255 for an image would leave few of 16 fraction bits to the weights); 2 rounds."""
    inputs = _moved_inputs(net)
    for affine in net.steps:
        if affine.op == "affine" and affine.inputs[0] not in inputs:
            shapes = net.shapes()
            if shapes[affine.inputs[0]] != affine.shape:
                continue
            changed = _push(net, affine.output, affine.shape, affine.params)
            if changed:
                kept = [changed.get(s.output, s) for s in net.steps if s is not affine]
                return affine_into_next(renamed(net.having(kept), {affine.output: affine.inputs[0]}))
    return net


def _moved_inputs(net: Net) -> set[str]:
    """Return the model's inputs and what is made of them without arithmetic."""
    found = set(net.inputs)
    for step in net.steps:
        if step.op in ("reshape", "transpose", "concat", "take", "expand") and found.issuperset(step.inputs):
            found.add(step.output)
    return found


def _push(net: Net, value: str, shape: Shape, factors: Mapping[str, Array]) -> dict[str, Step] | None:
    """Return by output the linear steps behind a value, changed as if it had been scaled and shifted; None if it must.

    Args:
        net: the net.
        value: name of what is to be scaled and shifted no longer.
        shape: of one sample of it.
        factors: "scale" and "shift", broadcasting against it; both may be left out.
    """
    users = net.users(value)
    if value in net.outputs or not users:
        return None
    changed: dict[str, Step] = {}
    for user in users:
        inner = None
        if user.op in LINEAR:
            scaled = _scaled(user, shape, factors)
            inner = None if scaled is None else {user.output: scaled}
        elif user.op in ("reshape", "transpose"):
            moved = {k: _moved(user, shape, v) for k, v in factors.items()}
            inner = _push(net, user.output, user.shape, moved)
        if inner is None:
            return None
        changed |= inner
    return changed


def _moved(step: Step, shape: Shape, value: Array) -> Array:
    if step.op == "transpose":
        return value.transpose(step.ints("perm"))
    return _reshaped(value, shape, step.shape)


def _scaled(step: Step, shape: Shape, factors: Mapping[str, Array]) -> Step | None:
    """Return the linear map x -> step(x * scale + shift), None when a map of its kind does not say it."""
    axis = _axis(step)
    if not all(_is_channelwise(v, axis) for v in factors.values()):
        return None
    values = {k: np.broadcast_to(v.ravel(), (shape[axis - 1],)) for k, v in factors.items()}
    params, weight = dict(step.params), step.params["weight"]
    if "shift" in values:
        if step.op == "conv2d" and any(step.ints("pads")):
            return None
        shift = _of_inputs(step, values["shift"]) * weight
        params["bias"] = param(step, "bias") + shift.sum((1, 2, 3) if step.op == "conv2d" else 0)
    if "scale" in values:
        params["weight"] = weight * _of_inputs(step, values["scale"])
    return replace(step, params=params)


def _of_inputs(step: Step, values: Array) -> Array:
    """Return a number for each channel of the input in the form in which it meets a weight."""
    if step.op == "matmul":
        return values[:, None]
    groups, n_out = int(step.number("groups")), len(step.params["weight"])
    return np.repeat(values.reshape(groups, -1), n_out // groups, axis=0)[:, :, None, None]


def sum_for_mean(net: Net) -> Net:
    """A mean, or an average over windows of one size, becomes a sum, and 1 / n goes into the convolutions and \
products behind it, if nothing else uses it and n * sqrt(K) <= 128 for K weights of each element; 1 round."""
    for mean in net.steps:
        n = _averaged(net, mean)
        if n:
            factors = {"scale": np.full((1,) * (len(mean.shape) + 1), 1 / n)}
            changed = _push(net, mean.output, mean.shape, factors)
            if changed and all(n * math.sqrt(_fan_in(s)) <= _PRECISE for s in changed.values()):
                op, less = ("sum", ()) if mean.op == "mean" else ("sum_pool2d", ("count_include_pad",))
                attrs = {k: v for k, v in mean.attrs.items() if k not in less}
                changed[mean.output] = replace(mean, op=op, attrs=attrs)
                return sum_for_mean(net.having([changed.get(s.output, s) for s in net.steps]))
    return net


def _averaged(net: Net, step: Step) -> int:
    """Return how many values each element of an average has, 0 for another step or where elements differ."""
    if step.op == "mean":
        return math.prod(net.shapes()[step.inputs[0]]) // math.prod(step.shape)
    if step.op == "avg_pool2d" and (step.number("count_include_pad") or not any(step.ints("pads"))):
        return math.prod(step.ints("kernel"))
    return 0


def _fan_in(step: Step) -> int:
    weight = step.params["weight"]
    return int(weight.size // weight.shape[0 if step.op == "conv2d" else 1])


# --- in a row -------------------------------------------------------------------------------------------------------


def linear_into_linear(net: Net) -> Net:
    """Two products, two convolutions (the second one not padded, or the first one 1x1 without bias), or a convolution \
and an average of its result become one, if nothing else uses what is between them and that takes at most 2**16 \
products, and twice the weights and 2**16, more; 2 rounds, bytes for an average."""
    return join_pairs(net, _into_linear)


def _into_linear(before: Step, step: Step) -> list[Step] | None:
    if before.op == step.op == "matmul":
        first, second = before.params["weight"], step.params["weight"]
        weights = first.shape[0] * second.shape[1]
        if not _pays((before, step), math.prod(step.shape[:-1]) * weights, weights):
            return None
        params = {"weight": first @ second}
        if "bias" in before.params or "bias" in step.params:
            params["bias"] = param(before, "bias") @ second + param(step, "bias")
        return [replace(before, output=step.output, shape=step.shape, params=params)]
    second_conv = _as_conv(before, step) if before.op == "conv2d" else None
    joined = None if second_conv is None else _join_convs(before, second_conv)
    if joined is None:
        return None
    if joined.shape == step.shape:
        return [replace(joined, output=step.output)]
    reshape = Step("reshape", step.name, (before.output,), step.output, step.shape, attrs={"shape": step.shape})
    return [replace(joined, output=before.output), reshape]


def _as_conv(before: Step, step: Step) -> Step | None:
    """Return a convolution, or an average of the convolution's result `before` as one: a kernel for each channel."""
    if step.op == "conv2d":
        return step
    if step.op == "avg_pool2d" and not any(step.ints("pads")):
        kernel, stride, shape = step.ints("kernel"), step.ints("stride"), step.shape
    elif step.op == "mean" and step.ints("axes") == (len(before.shape) - 1, len(before.shape)):
        kernel, stride, shape = before.shape[-2:], (1, 1), (*before.shape[:-2], 1, 1)
    else:
        return None
    channels = shape[-3]
    weight = np.full((channels, 1, *kernel), 1 / math.prod(kernel))
    attrs: dict[str, Attribute] = {"stride": stride, "pads": (0, 0, 0, 0), "dilation": (1, 1), "groups": channels}
    return Step("conv2d", step.name, step.inputs, step.output, shape, {"weight": weight}, attrs)


def _join_convs(first: Step, second: Step) -> Step | None:
    """Return the convolution that says second(first(x)), None when there is none or it costs more.

    Tap b of the second at its place q reads place s2 * q + d2 * b of the first, whose tap a reads x at
    s1 * (s2 * q + d2 * b) + d1 * a: taps at s1 * d2 * b + d1 * a, stride s1 * s2.
    """
    w1, w2 = first.params["weight"], second.params["weight"]
    pads = first.ints("pads")
    if any(second.ints("pads")):
        # The border of the first one's result is zero only where it would be zero inside the border as well.
        if "bias" in first.params or any(pads) or w1.shape[2:] != (1, 1) or first.ints("stride") != (1, 1):
            return None
        pads = second.ints("pads")
    (s1, d1), (s2, d2) = ((x.ints("stride"), x.ints("dilation")) for x in (first, second))
    near = [d1[i] if w1.shape[2 + i] > 1 else 0 for i in (0, 1)]
    far = [s1[i] * d2[i] if w2.shape[2 + i] > 1 else 0 for i in (0, 1)]
    step = [math.gcd(*both) or 1 for both in zip(near, far, strict=True)]
    size = [((w1.shape[2 + i] - 1) * near[i] + (w2.shape[2 + i] - 1) * far[i]) // step[i] + 1 for i in (0, 1)]
    each = w2.shape[1] == 1 and len(w2) == len(w1) == second.attrs["groups"]
    n_in = w1.shape[1] * (1 if each else int(first.number("groups")))
    weights = len(w2) * n_in * math.prod(size)
    if not _pays((first, second), math.prod(_places(second)) * weights, weights):
        return None
    w1, w2 = (w1, w2) if each else (_dense(first), _dense(second))
    weight = np.zeros((len(w2), n_in, *size))
    for p, q in np.ndindex(*w2.shape[2:]):
        rows = (far[0] * p + near[0] * np.arange(w1.shape[2])) // step[0]
        columns = (far[1] * q + near[1] * np.arange(w1.shape[3])) // step[1]
        tap = w2[:, :, p, q]
        weight[:, :, rows[:, None], columns] += tap[:, :, None, None] * w1 if each else np.tensordot(tap, w1, 1)
    params = {"weight": weight}
    if "bias" in first.params or "bias" in second.params:
        bias, taps = param(first, "bias"), w2.sum((2, 3))
        params["bias"] = param(second, "bias") + (taps[:, 0] * bias if each else taps @ bias)
    attrs = {
        "stride": (s1[0] * s2[0], s1[1] * s2[1]),
        "pads": pads,
        "dilation": (step[0], step[1]),
        "groups": first.attrs["groups"] if each else 1,
    }
    return replace(first, shape=second.shape, params=params, attrs=attrs)


def _dense(conv: Step) -> Array:
    """Return a convolution's weight as one group."""
    weight, groups = conv.params["weight"], int(conv.number("groups"))
    n_out, n_in = weight.shape[:2]
    dense = np.zeros((n_out, n_in * groups, *weight.shape[2:]))
    for i in range(groups):
        rows = slice(i * n_out // groups, (i + 1) * n_out // groups)
        dense[rows, i * n_in : (i + 1) * n_in] = weight[rows]
    return dense


# --- side by side ---------------------------------------------------------------------------------------------------


def parallel_linears(net: Net) -> Net:
    """Convolutions of one stride, or products, of the same values become one where nothing but their sum, difference \
or joined channels is used, kernels of several sizes included; the messages of all but one."""
    uses, shapes = net.uses(), net.shapes()
    makers = {step.output: step for step in net.steps}
    for step in net.steps:
        parts = [makers[x] for x in step.inputs if x in makers and uses[x] == 1]
        if len(parts) < max(2, len(step.inputs)):
            continue
        joined = _side_by_side(step, parts, shapes)
        if joined is not None:
            kept = [joined if s is step else s for s in net.steps if not any(s is x for x in parts)]
            return parallel_linears(net.having(kept))
    return net


def _side_by_side(step: Step, parts: Sequence[Step], shapes: Mapping[str, Shape]) -> Step | None:
    first = parts[0]
    if first.op not in LINEAR or any((x.op, x.inputs) != (first.op, first.inputs) for x in parts):
        return None
    concat = step.op == "concat" and step.number("axis") == _axis(first)
    if not concat and (step.op not in ("add", "sub") or any(x.shape != step.shape for x in parts)):
        return None
    aligned = list(parts) if first.op == "matmul" else _aligned(parts, shapes[first.inputs[0]])
    if aligned is None or (concat and first.op == "conv2d" and first.attrs["groups"] != 1):
        return None
    axis = 0 if first.op == "conv2d" else 1
    signs = [1.0, -1.0 if step.op == "sub" else 1.0] if not concat else []

    def both(role: str) -> Array:
        values = [param(x, role) for x in aligned]
        if concat:
            return np.concatenate(values, axis if role == "weight" else 0)
        return sum((sign * v for sign, v in zip(signs, values, strict=True)), np.zeros(()))

    roles = ["weight", *(["bias"] if any("bias" in x.params for x in parts) else [])]
    joined = replace(aligned[0], output=step.output, shape=step.shape, params={role: both(role) for role in roles})
    return joined if _pays(parts, _products(joined), _weights(joined)) else None


def _aligned(convs: Sequence[Step], shape: Shape) -> list[Step] | None:
    """Return convolutions with kernels of one size at one place, widened by zeros; None when there are none.

    Args:
        convs: of the same values.
        shape: (..., channels, height, width) of one sample of those.
    """
    if len({(x.ints("stride"), x.number("groups")) for x in convs}) > 1:
        return None
    sizes = [x.params["weight"].shape[2:] for x in convs]
    geometry = {(size, x.ints("pads"), x.attrs["dilation"]) for size, x in zip(sizes, convs, strict=True)}
    if len(geometry) == 1:
        return list(convs)
    if any(d > 1 < n for x, k in zip(convs, sizes, strict=True) for d, n in zip(x.ints("dilation"), k, strict=True)):
        return None
    before, after, width = [0, 0], [0, 0], [0, 0]
    stride, made, sizes_in = convs[0].ints("stride"), convs[0].shape[-2:], shape[-2:]
    for i in (0, 1):
        before[i] = max(x.ints("pads")[i] for x in convs)
        width[i] = before[i] + max(size[i] - x.ints("pads")[i] for x, size in zip(convs, sizes, strict=True))
        after[i] = max((made[i] - 1) * stride[i] + width[i] - sizes_in[i] - before[i], 0)
        if (sizes_in[i] + before[i] + after[i] - width[i]) // stride[i] + 1 != made[i]:
            return None
    attrs = {**convs[0].attrs, "pads": (*before, *after), "dilation": (1, 1)}
    found = []
    for x, size in zip(convs, sizes, strict=True):
        start = [before[i] - x.ints("pads")[i] for i in (0, 1)]
        weight = np.zeros((*x.params["weight"].shape[:2], *width))
        weight[:, :, start[0] : start[0] + size[0], start[1] : start[1] + size[1]] = x.params["weight"]
        found.append(replace(x, params={**x.params, "weight": weight}, attrs=attrs))
    return found
