"""Linear layers with the keeper's weights: one message, one product online, none of it at the user.

Once for each model the keeper sends D = W - B, masked by B from its stream, which the dealer knows
as well. Each call, before the input is known: the dealer draws the user's mask a and gives shares
c0 + c1 = B * a (`*` the layer's bilinear map); the user computes z1 = D * a + c1. Online the user
sends e = x1 - a, and the keeper computes z0 = W * (x0 + e) + c0 + b. Then z0 + z1 = W * x + b.

B may be used again for the same W, never for another: every call has its own a and c.
Source: [Bea91], [Mis20]; docs/protocols.md#linear-layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from protocols.cost import Cost, costs
from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, Dealing, Dealt, Kind, Request, share_for_keeper
from protocols.primitives import kernels
from protocols.primitives.prg import Stream
from protocols.program.program import Layer, Program, Shape
from protocols.two_party.party import Party

MAPS = {"conv2d": "weight", "matmul": "weight", "affine": "scale"}


def request_of(layer: Layer, shape: Sequence[int]) -> Request:
    """Return the correlation that one application of a layer to an input of `shape` needs."""
    options: list[tuple[str, Any]] = [("op", layer.op), ("weight", layer.params[MAPS[layer.op]])]
    made: Sequence[int] = (shape[0], *layer.shape)
    if layer.op == "conv2d":
        # Leading axes of a sample are images of their own.
        shape, made = ((math.prod(s[:-3]), *s[-3:]) for s in (shape, made))
        options += [(k, layer.ints(k)) for k in ("stride", "pads", "dilation")]
        options.append(("groups", int(layer.number("groups"))))
    return Request("linear", (tuple(shape), tuple(made)), tuple(options))


# Weights serve many predictions: each tensor is packed once for each layer that it serves, as long as it lives.
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _pack(request: Request, w: Tensor) -> kernels.Prepared:
    """Return w in the form that the product of a request wants."""
    options = dict(request.options)
    if w not in _PACKED:
        _PACKED[w] = {}
    forms = _PACKED[w]
    size = request.shapes[0][2:]
    key = (request.options, size)
    if key not in forms:
        if options["op"] == "matmul":
            forms[key] = kernels.prepare_matmul(w)
        else:
            how = {k: options[k] for k in ("stride", "pads", "dilation", "groups")}
            forms[key] = kernels.prepare_conv2d(w, size=(size[0], size[1]), **how)
    prepared: kernels.Prepared = forms[key]
    return prepared


def pack_weights(program: Program, weights: Mapping[str, Tensor]) -> None:
    """Pack the weights of all linear layers now, so that no prediction waits for it."""
    for layer in program.layers:
        name = layer.params.get(MAPS.get(layer.op, ""), "")
        if name in weights and layer.op != "affine":
            _pack(request_of(layer, (1, *program.shape(layer.inputs[0]))), weights[name])


def product(request: Request, x: Tensor, w: Tensor) -> Tensor:
    """Return w * x mod 2**64, the bilinear map of a request."""
    if dict(request.options)["op"] == "affine":
        return x * w
    return _pack(request, w).apply(x)


def _deal(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    mask = dealing.masks[str(dict(request.options)["weight"])]
    a = user.words(request.shapes[0])
    return [share_for_keeper(product(request, a, mask), user)], []


def _take(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if rank == KEEPER:
        return tuple(corrections)
    return stream.words(request.shapes[0]), stream.words(request.shapes[1])


correlation.KINDS["linear"] = Kind(
    _deal, _take, lambda q: q.shapes[1:], part=lambda q: q.shapes[1:], user_part=lambda q: q.shapes
)


def prepare(request: Request, part: tuple[Tensor, ...], masked: Tensor) -> tuple[Tensor, ...]:
    """Turn the user's (a, c1) into (a, z1) with z1 = D * a + c1: all of its work, before the input is known."""
    a, c1 = part
    return a, product(request, a, masked) + c1


@costs(lambda n: Cost(rounds=1, payload_bytes=8 * n))
def apply(party: Party, layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to a sharing.

    Args:
        party: this party.
        layer: conv2d, matmul or affine.
        x: share of the input, (n, ...) at scale 2**f.
        weight, bias: the keeper's W at scale 2**g, g the layer's fraction bits of weights, and b at scale
            2**(f + g); None at the user.

    Returns:
        Share of W * x + b, (n, *layer.shape) at scale 2**(f + g).

    Cost: 1 round (one message from the user), 8 bytes for each of n input elements.
    Security: e is uniform to the keeper; the user sees only D, which B masks.
    """
    request = request_of(layer, x.shape)
    part = party.correlations.take(request)
    made = (x.shape[0], *layer.shape)
    x = x.reshape(request.shapes[0])
    if party.rank != KEEPER:
        a, z1 = part
        party.wire.send("linear", x - a)
        return z1.reshape(made)
    (c0,) = part
    if weight is None or bias is None:
        raise TypeError("the keeper must have weights")
    z0 = product(request, x + party.wire.recv("linear", x.shape), weight)
    shape: Shape = (1, -1, 1, 1) if layer.op == "conv2d" else tuple(bias.shape)
    return z0.add_(c0).add_(bias.reshape(shape)).reshape(made)
