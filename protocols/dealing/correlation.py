"""What a dealer can make, as plain requests, and how each is made and taken.

A `Request` is public: a kind and shapes. Each party expands its part from a stream whose seed
the dealer knows as well; what cannot be drawn (the share that makes the relation true) the dealer
computes as *corrections* and sends to the keeper. So the user's part of a whole prediction costs
16 bytes, whatever it contains, and every correction is uniform: masked by the user's stream.

Shares are int64 tensors in Z_2^64 (additive), or bits and words under xor where it says so.

Source: docs/protocols.md#correlations, with the bytes of each kind.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocols.errors import UnsupportedError
from protocols.primitives import ring
from protocols.primitives.prg import Stream

KEEPER, USER = 0, 1
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One correlation that a protocol will ask for.

    Args:
        kind: a name of `KINDS`.
        shapes: what the kind's functions say.
        options: further public arguments, hashable.
    """

    kind: str
    shapes: tuple[Shape, ...]
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Secrets:
    """What the dealer alone knows of one prediction; absent for models without secured tasks.

    Args:
        gate_mask: m of the key gate, int64 0 or 1, shape of one sample.
        gate_pattern: m * p at scale 2**f, int64, shape of one sample.
        opening: output name -> probability with which a row's scores are revealed, each row by itself: 1 for an open
            task, 0 for a closed one, between them for one that is decoupled.
        noise: output name -> a function of the batch size that draws (n, C) scores, int64 at scale 2**f.
    """

    gate_mask: Tensor
    gate_pattern: Tensor
    opening: dict[str, float]
    noise: dict[str, Callable[[int], Tensor]]

    def __repr__(self) -> str:
        return "Secrets(<hidden>)"


@dataclass(frozen=True)
class Dealing:
    """What the dealer needs beside the streams: the secrets of the request, and the masks of the model's weights."""

    secrets: Secrets | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


# `deal` returns the keeper's corrections and those that both parties get; `take` returns a party's part.
# In both, draws from a stream come in the same order: where a kind is defined, its order is.
Dealt = tuple[list[Tensor], list[Tensor]]
Deal = Callable[[Request, Stream, Stream, Dealing], Dealt]
Take = Callable[[Request, int, Stream, Sequence[Tensor]], tuple[Tensor, ...]]
Shapes = Callable[[Request], Sequence[Shape]]


@dataclass(frozen=True)
class Kind:
    """How one kind of correlation is made.

    Args:
        deal: makes the corrections, at the dealer.
        take: makes a party's part from its stream and corrections (the keeper's own first, then the common ones).
        to_keeper: shapes of the keeper's corrections, int64.
        to_both: shapes of the corrections that both parties get, int64.
        part: shapes of the keeper's part, which a recorder hands out without values; empty where the
            protocol asks for none while it is recorded.
        user_part: the same of the user's part, where it is another.
    """

    deal: Deal
    take: Take
    to_keeper: Shapes
    to_both: Shapes = lambda request: ()
    part: Shapes = lambda request: ()
    user_part: Shapes | None = None


def share_for_keeper(value: Tensor, user: Stream) -> Tensor:
    """Return the keeper's share of a value whose user's share is the next draw of the user's stream."""
    return value - user.words(value.shape)


_OPS = ("mul", "matmul", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")


def _product(op: str, x: Tensor, y: Tensor, options: tuple[tuple[str, Any], ...]) -> Tensor:
    result: Tensor = getattr(torch, op)(x, y, **dict(options))
    return result


# --- triple: [a], [b], [c] with c = op(a, b); options: op and its keyword arguments ---------------------------------


def _split_op(request: Request) -> tuple[str, tuple[tuple[str, Any], ...]]:
    return str(request.options[0][1]), request.options[1:]


@functools.lru_cache(4096)
def _product_shape(request: Request) -> Shape:
    op, options = _split_op(request)
    if op not in _OPS:
        raise UnsupportedError(f"a triple must be of {', '.join(_OPS)}; got {op!r}")
    x, y = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in request.shapes)
    return tuple(_product(op, x, y, options).shape)


def _deal_triple(request: Request, keeper: Stream, user: Stream, _: Dealing) -> Dealt:
    op, options = _split_op(request)
    a0, b0 = (keeper.words(s) for s in request.shapes)
    a1, b1 = (user.words(s) for s in request.shapes)
    return [share_for_keeper(_product(op, a0 + a1, b0 + b1, options), user)], []


def _take_triple(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    a, b = (stream.words(s) for s in request.shapes)
    return a, b, corrections[0] if rank == KEEPER else stream.words(_product_shape(request))


# --- square: [r], [r * r] -------------------------------------------------------------------------------------------


def _deal_square(request: Request, keeper: Stream, user: Stream, _: Dealing) -> Dealt:
    r = keeper.words(request.shapes[0]) + user.words(request.shapes[0])
    return [share_for_keeper(r * r, user)], []


def _take_square(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    r = stream.words(request.shapes[0])
    return r, corrections[0] if rank == KEEPER else stream.words(request.shapes[0])


# --- and: xor-shares of words a, b and a & b ------------------------------------------------------------------------


def _deal_and(request: Request, keeper: Stream, user: Stream, _: Dealing) -> Dealt:
    a0, b0 = (keeper.words(s) for s in request.shapes)
    a1, b1 = (user.words(s) for s in request.shapes)
    c = (a0 ^ a1) & (b0 ^ b1)
    return [c ^ user.words(c.shape)], []


def _take_and(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    a, b = (stream.words(s) for s in request.shapes)
    return a, b, corrections[0] if rank == KEEPER else stream.words(np.broadcast_shapes(*request.shapes))


# --- bit: a random bit as xor-sharing and as arithmetic sharing -----------------------------------------------------


def _deal_bit(request: Request, keeper: Stream, user: Stream, _: Dealing) -> Dealt:
    (shape,) = request.shapes
    return [share_for_keeper((keeper.words(shape) & 1) ^ (user.words(shape) & 1), user)], []


def _take_bit(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (shape,) = request.shapes
    bit = stream.words(shape) & 1
    return bit, corrections[0] if rank == KEEPER else stream.words(shape)


# --- truncation by option bits: [r], [R] with R = r >> bits (logical), [m] with m the top bit of r. A truncation
# multiplies m by 2**(64 - bits): it is shared mod 2**32, two in a word, where that is enough -------------------------

_HALF_BITS = 32


def share_lanes(lanes: Tensor, user: Stream, kind: torch.dtype) -> Tensor:
    """Return the keeper's share of words of lanes of a `kind`, lane by lane, for a user's share from its stream."""
    mask = user.words(lanes.shape)
    difference = lanes.unsqueeze(-1).view(kind) - mask.unsqueeze(-1).view(kind)
    return difference.view(torch.int64).squeeze(-1)


def _top_bits_shape(request: Request) -> Shape:
    (shape,) = request.shapes
    return (-(-int(np.prod(shape)) // 2),) if bits_of(request) <= _HALF_BITS else shape


def _share_top_bits(request: Request, m: Tensor, user: Stream) -> Tensor:
    if bits_of(request) > _HALF_BITS:
        return share_for_keeper(m, user)
    lanes = torch.zeros(2 * _top_bits_shape(request)[0], dtype=torch.int32)
    lanes[: m.numel()] = m.reshape(-1).to(torch.int32)
    return share_lanes(lanes.view(torch.int64), user, torch.int32)


def _top_bits(request: Request, words: Tensor) -> Tensor:
    (shape,) = request.shapes
    if bits_of(request) > _HALF_BITS:
        return words
    return words.view(torch.int32)[: int(np.prod(shape))].to(torch.int64).reshape(shape)


def bits_of(request: Request) -> int:
    """Return the bits that a request's values are truncated by."""
    return int(dict(request.options)["bits"])


def _deal_truncation(request: Request, keeper: Stream, user: Stream, _: Dealing) -> Dealt:
    (shape,) = request.shapes
    r = keeper.words(shape) + user.words(shape)
    return [
        share_for_keeper(ring.shift_right_logical(r, bits_of(request)), user),
        _share_top_bits(request, ring.top_bit(r), user),
    ], []


def _take_truncation(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (shape,) = request.shapes
    r = stream.words(shape)
    R, m = corrections if rank == KEEPER else (stream.words(shape), stream.words(_top_bits_shape(request)))
    return r, R, _top_bits(request, m)


# --- key_gate: the user's mask a, and [m], [m p], [m a]; shapes: the batch ------------------------------------------


def _deal_key_gate(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    (shape,) = request.shapes
    a = user.words(shape)
    m, mp = (torch.zeros(shape[1:], dtype=torch.int64),) * 2
    secrets = dealing.secrets
    if secrets is not None:
        m, mp = secrets.gate_mask, secrets.gate_pattern
    return [share_for_keeper(m, user), share_for_keeper(mp, user), share_for_keeper(m * a, user)], []


def _take_key_gate(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (shape,) = request.shapes
    if rank == KEEPER:
        return tuple(corrections)
    return stream.words(shape), stream.words(shape[1:]), stream.words(shape[1:]), stream.words(shape)


# --- output_gate of option task: [r], [o], [o R], [o m], [(1 - o) n] ------------------------------------------------


def _deal_output_gate(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    (shape,) = request.shapes
    task, secrets = str(dict(request.options)["task"]), dealing.secrets
    opening = 1.0 if secrets is None else secrets.opening[task]
    r = keeper.words(shape) + user.words(shape)
    rows = _rows_of(shape)
    # Uniform numbers lie below 1, so that 0 and 1 are certain; drawn for them as well, that the time is the same.
    o = (Stream().uniform(rows) < opening).long()
    noise = torch.zeros(shape, dtype=torch.int64)
    if secrets is not None and task in secrets.noise:
        # Drawn for an open task as well: the time to deal must not tell which tasks are open.
        noise = secrets.noise[task](shape[0]) * (1 - o)
    bits = bits_of(request)
    R = ring.shift_right_logical(r, bits) if bits else r
    values = [o, o * R, o * ring.top_bit(r), noise]
    return [share_for_keeper(value, user) for value in values], []


def _take_output_gate(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (shape,) = request.shapes
    r = stream.words(shape)
    if rank == KEEPER:
        return r, *corrections
    return r, stream.words(_rows_of(shape)), stream.words(shape), stream.words(shape), stream.words(shape)


def _rows_of(shape: Shape) -> Shape:
    """Return the shape of one number for each row of a batch, that broadcasts against `shape`."""
    return (shape[0], *(1 for _ in shape[1:]))


KINDS: dict[str, Kind] = {
    "triple": Kind(
        _deal_triple, _take_triple, lambda q: [_product_shape(q)], part=lambda q: [*q.shapes, _product_shape(q)]
    ),
    "square": Kind(_deal_square, _take_square, lambda q: q.shapes, part=lambda q: q.shapes * 2),
    "and": Kind(
        _deal_and,
        _take_and,
        lambda q: [np.broadcast_shapes(*q.shapes)],
        part=lambda q: [*q.shapes, np.broadcast_shapes(*q.shapes)],
    ),
    "bit": Kind(_deal_bit, _take_bit, lambda q: q.shapes, part=lambda q: q.shapes * 2),
    "truncation": Kind(
        _deal_truncation,
        _take_truncation,
        lambda q: [q.shapes[0], _top_bits_shape(q)],
        part=lambda q: q.shapes * 3,
    ),
    "key_gate": Kind(
        _deal_key_gate,
        _take_key_gate,
        lambda q: [q.shapes[0][1:], q.shapes[0][1:], q.shapes[0]],
        part=lambda q: [q.shapes[0][1:], q.shapes[0][1:], q.shapes[0]],
        user_part=lambda q: [q.shapes[0], q.shapes[0][1:], q.shapes[0][1:], q.shapes[0]],
    ),
    "output_gate": Kind(
        _deal_output_gate,
        _take_output_gate,
        lambda q: [_rows_of(q.shapes[0]), *q.shapes * 3],
        part=lambda q: [q.shapes[0], _rows_of(q.shapes[0]), *q.shapes * 3],
    ),
}


def deal(request: Request, keeper: Stream, user: Stream, dealing: Dealing) -> Dealt:
    """Return one request's corrections for the keeper and for both parties, and advance both streams.

    Security: each correction of the keeper is a value minus a fresh draw of the user's stream, hence
    uniform to the keeper, who does not know that stream; what both get is as its kind says.
    """
    return KINDS[request.kind].deal(request, keeper, user, dealing)


def take(request: Request, rank: int, stream: Stream, corrections: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one party's part of a request and advance its stream."""
    return KINDS[request.kind].take(request, rank, stream, corrections)


def correction_shapes(request: Request, rank: int) -> list[Shape]:
    """Return the shapes of the corrections that a party gets for a request."""
    kind = KINDS[request.kind]
    own = list(kind.to_keeper(request)) if rank == KEEPER else []
    return [tuple(shape) for shape in (*own, *kind.to_both(request))]


def part_shapes(request: Request, rank: int = KEEPER) -> Sequence[Shape]:
    """Return the shapes of a party's part of a request, for a recorder."""
    kind = KINDS[request.kind]
    return (kind.user_part if rank == USER and kind.user_part is not None else kind.part)(request)
