"""The key gate at the input and the output gate at the scores, both from the authority's shares.

Neither adds a round to what a prediction needs without it, and neither shows on the wire which
tasks are open: a refused or absent key enters as zeros, over the same messages.

Source: docs/protocols.md#key-gate and docs/protocols.md#output-gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from protocols.cost import Cost, costs
from protocols.dealing.correlation import KEEPER, USER, Request
from protocols.two_party.party import Party, open_many, public_part


@costs(lambda n: Cost(rounds=1, payload_bytes=8 * n))
def share_gated_input(party: Party, x: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Share the user's input with the granted keys stamped in: x' = x - m x + m p.

    The user sends e = x - a, which shares x as (e, a). With the dealer's [m], [m p] and [m a],
    m x = e [m] + [m a], so x' is local.

    Args:
        party: this party.
        x: the user's batch, int64 of `shape` at scale 2**f; None at the keeper.
        shape: (n, *sample), public.

    Returns:
        Share of x', scale 2**f.

    Cost: 1 round (one message), 8 bytes for each of n elements: the same as sharing the input alone.
    Security: e is uniform to the keeper and unknown to the authority; m, p stay with the authority.
    """
    shape = tuple(shape)
    part = party.correlations.take(Request("key_gate", (shape,)))
    if party.rank == USER:
        a, m, mp, ma = part
        if x is None:
            raise TypeError("the user must have an input")
        e = x - a
        party.wire.send("input", e)
        return a - e * m - ma + mp
    m, mp, ma = part
    e = party.wire.recv("input", shape)
    return e - e * m - ma + mp


@dataclass(frozen=True)
class Scores:
    """The scores of one output before it is revealed.

    Args:
        name: of the output.
        share: (n, ...) int64 at scale 2**(f + bits).
        bits: how far to truncate; 0 for scores that are at scale 2**f already.
        gated: whether the authority may replace them.
    """

    name: str
    share: Tensor
    bits: int
    gated: bool


@costs(lambda n: Cost(rounds=1, payload_bytes=16 * n))
def close_outputs(party: Party, outputs: Sequence[Scores]) -> list[Tensor]:
    """Truncate all outputs, and replace a closed row's scores by the authority's noise: y' = o y + (1 - o) n.

    With h = z + r + 2**62 opened (as in `party.truncate`; without the offset when bits is 0),
    o y = [o] T - [o R] + [o m] g, and the dealer gives [(1 - o) n] besides; o is 0 or 1 for each row. All
    outputs open in one message each way.

    Args:
        party: this party.
        outputs: in the program's order.

    Returns:
        Shares of the y' in that order, at scale 2**f. Outputs that are neither gated nor truncated
        pass unchanged.

    Cost: 1 round, 16 bytes for each of n elements; none beyond the truncation that it replaces.
    Security: o, n and r are the dealer's; h is uniform to both parties. The user, to whom y' is
        revealed next, learns y' and nothing else, for the keeper's share is y' minus its own.
    """
    parts = [_correlation(party, y) for y in outputs]
    touched = [i for i, y in enumerate(outputs) if y.gated or y.bits]
    masked = []
    for i in touched:
        offset = 1 << 62 if outputs[i].bits and party.rank == KEEPER else 0
        masked.append(outputs[i].share + parts[i][0] + offset)
    shares = [y.share for y in outputs]
    for i, h in zip(touched, open_many(party, masked), strict=True):
        shares[i] = _finish(party, outputs[i], h, parts[i])
    return shares


def _correlation(party: Party, y: Scores) -> tuple[Tensor, ...]:
    shape = (tuple(y.share.shape),)
    if y.gated:
        return party.correlations.take(Request("output_gate", shape, (("bits", y.bits), ("task", y.name))))
    if y.bits:
        return party.correlations.take(Request("truncation", shape, (("bits", y.bits),)))
    return ()


def _finish(party: Party, y: Scores, h: Tensor, part: tuple[Tensor, ...]) -> Tensor:
    if not y.gated:
        _, R, m = part
        T, g = public_part(h, y.bits)
        t = g * m - R
        return t + T if party.rank == KEEPER else t
    _, o, oR, om, noise = part
    if y.bits == 0:
        return o * h - oR + noise
    T, g = public_part(h, y.bits)
    return o * T - oR + om * g + noise
