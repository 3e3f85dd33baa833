"""A computing party, and the protocols that need nothing else: input, reveal, truncation.

Two parties compute: the keeper (rank 0) and the user (rank 1). A value is shared as
x = x0 + x1 mod 2**64; a `Tensor` inside `protocols` is always one party's share of that.

Source: docs/protocols.md#input-sharing, docs/protocols.md#reveal, docs/protocols.md#opening and
docs/protocols.md#truncation; parts of correlations, docs/protocols.md#correlations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from protocols import limits
from protocols.cost import Cost, costs
from protocols.dealing.correlation import KEEPER, Request
from protocols.dealing.prediction_shares import Correlations
from protocols.primitives import ring
from protocols.primitives.prg import Stream


class Wire(Protocol):
    """What a party asks of the connection to the other one; a `Link` through `TensorWire`."""

    def exchange(self, kind: str, tensor: Tensor) -> Tensor:
        """Send a tensor and return the peer's of the same shape."""

    def send(self, kind: str, tensor: Tensor) -> None:
        """Send a tensor."""

    def recv(self, kind: str, shape: Sequence[int]) -> Tensor:
        """Return the peer's int64 tensor of `shape`."""


@dataclass
class Party:
    """One computing party during one prediction.

    Args:
        rank: 0 keeper, 1 user.
        wire: the connection to the other party.
        correlations: this party's parts, made by the dealer.
        previous, following: streams that both parties hold, each other's way round (CrypTen's zero sharings).
        local: this party's own randomness.
        device: where its tensors lie: "cpu", or "meta" for a recorder's run on shapes without values.
        is_negative: how the party's protocol compares: share -> share of the bit [x < 0]; set by `runner.run`.
        comparison_bits: bits k of comparisons by keys: values at scale 2**f must stay below 2**(k-1).
    """

    rank: int
    wire: Wire
    correlations: Correlations
    previous: Stream = field(repr=False)
    following: Stream = field(repr=False)
    local: Stream = field(repr=False)
    device: str = "cpu"
    is_negative: "Callable[[Party, Tensor], Tensor] | None" = None
    comparison_bits: int = limits.COMPARISON_BITS


@costs(lambda n: Cost(rounds=0, payload_bytes=0))
def share_input(party: Party, x: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Share the user's value: the value itself at the user, zero at the keeper. Nothing is sent.

    Args:
        party: this party.
        x: the user's int64 tensor; None at the keeper.
        shape: its public shape.

    Returns:
        0 at the keeper, x at the user.

    Cost: 0 rounds, 0 bytes.
    Security: the keeper gets nothing. A share need not be random: whatever a protocol sends later is under a fresh
        mask of its own, and what the keeper reveals is the output minus the user's share.
    """
    if party.rank == KEEPER:
        return torch.zeros(tuple(shape), dtype=torch.int64, device=party.device)
    if x is None:
        raise TypeError("the user must have an input")
    return x


@costs(lambda n: Cost(rounds=1, payload_bytes=8 * n))
def reveal_to_user(party: Party, x: Tensor) -> Tensor | None:
    """Reveal a sharing to the user alone: the keeper sends its share.

    Returns:
        The value at the user, None at the keeper.

    Cost: 1 round (one message), 8 bytes for each of n elements.
    Security: the user learns x and nothing else; the keeper learns nothing.
    """
    if party.rank == KEEPER:
        party.wire.send("reveal", x)
        return None
    return x + party.wire.recv("reveal", x.shape)


@costs(lambda n: Cost(rounds=1, payload_bytes=16 * n))
def truncate(party: Party, z: Tensor, bits: int) -> Tensor:
    """Divide a sharing by 2**bits without wrap errors.

    Opens h = z + r + 2**62 for the dealer's mask r, with m the top bit of r and R = r >> bits; then
    t = (h >> bits) - 2**(62 - bits) - R + m g, where g = (1 - top bit of h) << (64 - bits).

    Args:
        party: this party.
        z: share, int64 of any shape, |z| < 2**62.
        bits: 1..62.

    Returns:
        Share of floor(z / 2**bits) or one above, never further off.

    Cost: 1 round, 16 bytes for each of n elements (both ways together).
    Security: perfect against one semi-honest party, given a uniform r. The rounding is that of a public coin: h tells
        both parties at which threshold z was rounded.
    Source: ours, after [Cat10] and [Esc20]; proof in docs/protocols.md#truncation.
    """
    r, R, m = party.correlations.take(Request("truncation", (tuple(z.shape),), (("bits", bits),)))
    h = open_masked(party, z, r)
    T, g = public_part(h, bits)
    t = g * m - R
    return t + T if party.rank == KEEPER else t


@costs(lambda n: Cost(rounds=1, payload_bytes=16 * n))
def truncate_many(party: Party, values: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Divide several sharings, each by its 2**bits, as `truncate` does, in one round; bits 0 leaves one as it is.

    Cost: 1 round, none where nothing is to be divided; 16 bytes for each of n elements that are.
    Security: as `truncate`: each value is opened under a mask of its own.
    """
    places = [i for i, (_, bits) in enumerate(values) if bits]
    parts = [
        party.correlations.take(Request("truncation", (tuple(z.shape),), (("bits", bits),)))
        for z, bits in (values[i] for i in places)
    ]
    offset = 1 << 62 if party.rank == KEEPER else 0
    opened = open_many(party, [values[i][0] + part[0] + offset for i, part in zip(places, parts, strict=True)])
    results = [z for z, _ in values]
    for i, h, (_, R, m) in zip(places, opened, parts, strict=True):
        T, g = public_part(h, values[i][1])
        t = g * m - R
        results[i] = t + T if party.rank == KEEPER else t
    return results


def open_masked(party: Party, z: Tensor, r: Tensor) -> Tensor:
    """Open h = z + r + 2**62; uniform to both parties, for r is a dealer's mask. One round."""
    masked = z + r
    if party.rank == KEEPER:
        masked = masked + (1 << 62)
    return masked + party.wire.exchange("open", masked)


def open_many(party: Party, masked: Sequence[Tensor]) -> list[Tensor]:
    """Open several masked sharings in one message each way. One round, none for an empty list."""
    if not masked:
        return []
    flat = torch.cat([x.reshape(-1) for x in masked])
    total = flat + party.wire.exchange("open", flat)
    parts = torch.split(total, [x.numel() for x in masked])
    return [part.reshape(x.shape) for part, x in zip(parts, masked, strict=True)]


def public_part(h: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return T = (h >> bits) - 2**(62 - bits) and g = (1 - top bit of h) << (64 - bits)."""
    T = ring.shift_right_logical(h, bits) - (1 << (62 - bits))
    return T, (1 - ring.top_bit(h)) << (limits.RING_BITS - bits)
