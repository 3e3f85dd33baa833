"""Products with a shared operand that is used again and again, such as a weight: its mask is opened once.

Beaver's protocol opens x - a and w - b for a fresh triple each time. Here D = w - B is opened at the first use of w
alone, for a mask B that belongs to this w for ever. Each product then takes a fresh a and c = a * B from the dealer
and opens e = x - a:

    x * w = c + a * D + e * (B + D),    each party with its shares of a, c and B (party 0 adds D to its B).

B hides one w and no other: a weight that was changed in place is a new one.
Source: Beaver, CRYPTO 1991 [Bea91]; the reuse of a mask for one secret is ours, docs/protocols.md#reused-masks.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from protocols.cost import Cost, costs
from protocols.dealing import correlation
from protocols.dealing.correlation import KEEPER, Dealing, Dealt, Kind, Request, Shape, share_for_keeper
from protocols.primitives.prg import Stream
from protocols.two_party import linear
from protocols.two_party.party import Party, open_many

Options = tuple[tuple[str, Any], ...]
MATMUL: Options = (("op", "matmul"),)


def conv2d(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Options:
    """Return the options of a convolution, pairs as torch has them."""
    top, left = padding
    pads = (top, left, top, left)
    return (
        ("op", "conv2d"),
        ("stride", tuple(stride)),
        ("pads", pads),
        ("dilation", tuple(dilation)),
        ("groups", groups),
    )


def out_shape(options: Options, x: Sequence[int], w: Sequence[int]) -> Shape:
    """Return the shape of x * w: x (..., K), w (K, N), or x (n, C, h, w), w (O, C / groups, kh, kw)."""
    how = dict(options)
    if how["op"] == "matmul":
        return (*x[:-1], w[1])
    sizes = (
        (n + p + q - d * (k - 1) - 1) // s + 1
        for n, p, q, d, k, s in zip(
            x[2:], how["pads"][:2], how["pads"][2:], how["dilation"], w[2:], how["stride"], strict=True
        )
    )
    return (x[0], w[0], *sizes)


# --- reused: [a], [a * B]. Shapes: of x, of the product, of the weight; options: the weight's number and the product's


def _deal(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    a = keeper.words(request.shapes[0]) + user.words(request.shapes[0])
    mask = dealing.masks[str(dict(request.options)["weight"])]
    return [share_for_keeper(linear.product(request, a, mask), user)], []


def _take(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    a = stream.words(request.shapes[0])
    return a, corrections[0] if rank == KEEPER else stream.words(request.shapes[1])


correlation.KINDS["reused"] = Kind(_deal, _take, lambda q: q.shapes[1:2], part=lambda q: q.shapes[:2])


@dataclass
class _Weight:
    """One weight as its users remember it."""

    number: int
    version: int
    seen: Tensor = field(repr=False)
    opened: Tensor | None = field(repr=False, default=None)
    share: Tensor | None = field(repr=False, default=None)


class Weights:
    """The weights that one party has met, as long as they live.

    Args:
        mask: returns this party's share of the mask of a weight by number and shape.
    """

    def __init__(self, mask: Callable[[int, Shape], Tensor]) -> None:
        self._mask = mask
        self._numbers = itertools.count()
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def _find(self, w: Tensor) -> _Weight:
        # A view made anew each time, such as w.t(), is known by what it views.
        base = w if w._base is None else w._base
        if base not in self._known:
            self._known[base] = {}
        forms = self._known[base]
        key = (tuple(w.shape), w.stride(), w.storage_offset())
        known: _Weight | None = forms.get(key)
        if known is None or known.version != w._version or not known.seen.equal(w):
            known = forms[key] = _Weight(next(self._numbers), w._version, w.clone())
        return known

    @costs(lambda n, new_weights: Cost(rounds=1, payload_bytes=16 * (n + new_weights)))
    def multiply(self, party: Party, options: Options, x: Tensor, w: Tensor) -> Tensor:
        """Return a share of x * w mod 2**64, without rescaling.

        Args:
            party: this party.
            options: `MATMUL`, or what `conv2d` returns.
            x, w: shares, int64; shapes as `out_shape` says.

        Cost: 1 round; 16 bytes for each of n elements of x, and of w where this is its first use.
        Security: D and e are uniform: w under B, of which each party knows a share alone, x under a fresh a.
        """
        weight = self._find(w)
        shapes = (tuple(x.shape), out_shape(options, x.shape, w.shape), tuple(w.shape))
        request = Request("reused", shapes, (("weight", str(weight.number)), *options))
        a, c = party.correlations.take(request)
        if weight.opened is None or weight.share is None:
            mask = self._mask(weight.number, tuple(w.shape))
            e, opened = open_many(party, [x - a, w - mask])
            weight.opened = opened.contiguous()
            weight.share = mask + opened if party.rank == KEEPER else mask
        else:
            (e,) = open_many(party, [x - a])
        z = linear.product(request, a, weight.opened)
        return z.add_(linear.product(request, e, weight.share)).add_(c)
