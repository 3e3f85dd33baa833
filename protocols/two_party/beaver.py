"""Products of two shared values, by triples of the dealer.

With [a], [b] and [c], c = a * b, both parties open x - a and y - b under masks that serve once; then

    x * y = c + a * D + e * (b + D),    e = x - a, D = y - b, each party with its shares of a, b and c,

where party 0 alone adds D to its share of b. `*` is any bilinear map of `torch` on integers.

Cost: 1 round; 16 bytes for each element of x and of y. A square opens its one operand: 16 bytes an element.
Security: e and D are uniform to both parties, for each knows one summand of a and b alone.
Source: [Bea91]; docs/protocols.md#products.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from protocols.cost import Cost, costs
from protocols.dealing.correlation import KEEPER, Request
from protocols.two_party.party import Party, open_many


def _product(party: Party, op: str, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    request = Request("triple", (tuple(x.shape), tuple(y.shape)), (("op", op), *sorted(options.items())))
    a, b, c = party.correlations.take(request)
    e, opened = open_many(party, [x - a, y - b])
    bilinear = getattr(torch, op)
    z: Tensor = c + bilinear(a, opened, **options)
    z += bilinear(e, b + opened if party.rank == KEEPER else b, **options)
    return z


# n: elements of both operands together.
@costs(lambda n: Cost(rounds=1, payload_bytes=16 * n))
def mul(party: Party, x: Tensor, y: Tensor) -> Tensor:
    """Return a share of x * y mod 2**64, element by element, without rescaling.

    Args:
        party: this party.
        x, y: shares, int64; shapes that broadcast.

    Cost: 1 round; 16 bytes for each element of x and of y.
    Security: as the module says.
    """
    return _product(party, "mul", x, y)


@costs(lambda n: Cost(rounds=1, payload_bytes=16 * n))
def matmul(party: Party, x: Tensor, y: Tensor) -> Tensor:
    """Return a share of x @ y mod 2**64, without rescaling.

    Args:
        party: this party.
        x, y: shares, int64; (..., M, K) and (..., K, N), leading axes broadcast.

    Cost: 1 round; 16 bytes for each element of x and of y.
    Security: as the module says.
    """
    return _product(party, "matmul", x, y)


@costs(lambda n: Cost(rounds=1, payload_bytes=16 * n))
def conv2d(
    party: Party, x: Tensor, y: Tensor, stride: Sequence[int], dilation: Sequence[int] = (1, 1), groups: int = 1
) -> Tensor:
    """Return a share of the convolution of x with y mod 2**64, without padding and without rescaling.

    Args:
        party: this party.
        x, y: shares, int64; (n, C, h, w) and (O, C / groups, kh, kw).
        stride, dilation: pairs, lines first.
        groups: of channels.

    Returns:
        Share, (n, O, h', w').

    Cost: 1 round; 16 bytes for each element of x and of y.
    Security: as the module says.
    """
    return _product(party, "conv2d", x, y, stride=tuple(stride), dilation=tuple(dilation), groups=groups)


@costs(lambda n: Cost(rounds=1, payload_bytes=16 * n))
def square(party: Party, x: Tensor) -> Tensor:
    """Return a share of x * x mod 2**64, element by element, without rescaling.

    With [r], [r * r] and e = x - r opened: x * x = r * r + 2 e r + e * e, the last term at party 0.

    Args:
        party: this party.
        x: share, int64 of any shape.

    Cost: 1 round; 16 bytes for each of n elements.
    Security: as the module says.
    """
    r, r2 = party.correlations.take(Request("square", (tuple(x.shape),)))
    (e,) = open_many(party, [x - r])
    z = r2 + 2 * e * r
    return z + e * e if party.rank == KEEPER else z
