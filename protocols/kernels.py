"""Exact products in Z_2^64 on the CPU: matmul and conv2d of int64 tensors, wrapping around.

A factor is split once as x = lo + 2**32 hi with lo signed. Modulo 2**64

    x w = lo(x) lo(w)                             32 x 32 -> 64 bit products, 4 to an AVX2 vector
        + 2**32 (hi(x) lo(w) + lo(x) hi(w))       32-bit products that wrap, 8 to a vector

and each of the two sums has accumulators of its own, joined once at the end. Weights in [-2**31, 2**31), such as
encoded ones, have hi(w) = 0 and need three vector products for 8 terms instead of four. That is 5.3 products a cycle
at best on two vector multipliers (4 for full weights), where float64 limbs through BLAS reach 4 (1.3) at best.

A 3x3 convolution of stride 1 is, along each axis, a product with a symmetric matrix: three neighbouring outputs are
y_i = sum_j x_{i+j} w_j, and as x_{i+j} = x_{j+i}

    y_i = (x_{2i} - sum_{j != i} x_{i+j}) w_i + sum_{j != i} x_{i+j} (w_i + w_j)

takes 6 products instead of 9, hence 36 instead of 81 on a 3x3 tile. Unlike Winograd's, this form [Kar63] divides by
nothing, so it is exact in the ring.

The inner loops are LLVM vectors compiled by numba, correct on every little-endian CPU. Without numba, or on a
big-endian CPU, torch multiplies limbs in float64 that are small enough to be exact; `BACKEND` says which.
Numba keeps compiled code beside this file or, where that is read-only, in the user's cache folder; NUMBA_CACHE_DIR
names another one. `warm()` compiles or loads all of it: call it before anything is timed.
"""

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from protocols.errors import ShapeError

try:
    import numba
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    HAS_NUMBA = True
except ImportError:
    HAS_NUMBA = False

# Numbers are read as pairs of words, the low one first.
BACKEND = "numba" if HAS_NUMBA and sys.byteorder == "little" else "torch"

Ints = NDArray[np.int64]
Words = NDArray[np.int32]
Pair = tuple[int, int]
F_ = TypeVar("F_", bound=Callable[..., Any])

# Outputs of one panel of packed weights: an AVX2 vector of 32-bit words.
LANES = 8
# Rows (pixels) that one tile multiplies with a panel: as many as 16 vector registers hold accumulators for.
TILE_ROWS, TILE_ROWS_WIDE = 4, 3
# Rows that go through all panels before the next: a multiple of both, small enough to stay in the L2 cache.
BLOCK_ROWS = 48
# Bytes of one chunk of the batch, laid out for the product. Memory is bounded by this or by one image.
CHUNK_BYTES = 1 << 23
# Tiles of 3x3 outputs under way at a time: enough for the packed weights to be read seldom.
BAND_TILES = 48
# Ways to convolve: "limbs" is torch's, the others are numba's.
METHODS = ("tiles", "karatsuba", "depthwise", "limbs")
# The six products of one axis of a 3x3 tile: i = j stands for weight i alone, i < j for the sum of two.
PRODUCTS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
SIDE = 3
# Even lanes of a panel accumulate outputs 0 to 3, odd ones 4 to 7, so that both halves leave as whole vectors.
_LANE_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]

# A row in one piece that is always used.
_AT_ONCE, _ALL = np.zeros(1, np.int64), np.array([0, 1], np.int64)
_log = logging.getLogger(__name__)
_local = threading.local()


def _jit(function: F_) -> F_:
    """Compile with numba, with a cache on disk where there is a place for it; leave as it is without numba."""
    if not HAS_NUMBA:
        return function
    try:
        return cast(F_, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # no folder that the cache could be written to
        return cast(F_, numba.njit(nogil=True)(function))


# ---- vectors -------------------------------------------------------------------------------------------------------


def _constant(vector: Any, value: int) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _at(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def _add(b: Any, address: Any, offset: int) -> Any:
    return b.add(address, ir.Constant(ir.IntType(64), offset))


def _variable(b: Any, value: Any) -> Any:
    """Return a place that LLVM keeps in registers, for sums that a loop runs along."""
    return cgutils.alloca_once_value(b, value)  # type: ignore[no-untyped-call]


def _load_all(b: Any, address: Any, kind: Any) -> Any:
    """Load one number into all lanes of a vector."""
    one = b.load(_at(b, address, kind.element))
    none = ir.Constant(kind, ir.Undefined)
    single = b.insert_element(none, one, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(single, none, _constant(ir.VectorType(ir.IntType(32), kind.count), 0))


def _make_tile(rows: int, wide: bool) -> Any:
    """Return tile(starts, w, steps, n_steps, length, out, out_step): `rows` rows times one panel of weights.

    Row r is the numbers at starts[r] + steps[s], s < n_steps, `length` each; its 8 products go to out + r out_step.
    All are addresses, and steps are in bytes.
    """

    @intrinsic
    def tile(_: Any, starts: Any, w: Any, steps: Any, n_steps: Any, length: Any, out: Any, out_step: Any) -> Any:
        def generate(context: Any, b: Any, _: Any, arguments: Any) -> Any:
            starts, w, steps, n_steps, length, out, out_step = arguments
            word, number = ir.IntType(32), ir.IntType(64)
            words, numbers = ir.VectorType(word, LANES), ir.VectorType(number, LANES // 2)
            half = _constant(numbers, 32)
            sums = [[_variable(b, _constant(kind, 0)) for kind in (numbers, numbers, words)] for _ in range(rows)]
            weights = _variable(b, w)

            def accumulate(place: Any, term: Any) -> None:
                b.store(b.add(b.load(place), term), place)

            def signed(vector: Any) -> Any:
                return b.ashr(b.shl(vector, half), half)

            with cgutils.for_range(b, n_steps) as outer:
                step = b.load(b.gep(_at(b, steps, number), [outer.index]))
                row = [b.add(b.extract_value(starts, r), step) for r in range(rows)]
                with cgutils.for_range(b, length) as inner:
                    here = b.load(weights)
                    w_low = b.load(_at(b, here, words), align=4)
                    w_high = b.load(_at(b, _add(b, here, 4 * LANES), words), align=4) if wide else None
                    b.store(_add(b, here, (8 if wide else 4) * LANES), weights)
                    # LLVM turns a product of two sign-extended halves into vpmuldq, which reads the low halves alone.
                    even, odd = signed(b.bitcast(w_low, numbers)), b.ashr(b.bitcast(w_low, numbers), half)
                    offset = b.shl(inner.index, ir.Constant(number, 3))
                    for r in range(rows):
                        address = b.add(row[r], offset)
                        x_low = _load_all(b, address, words)
                        x_high = _load_all(b, _add(b, address, 4), words)
                        x_signed = signed(b.bitcast(x_low, numbers))
                        accumulate(sums[r][0], b.mul(x_signed, even))
                        accumulate(sums[r][1], b.mul(x_signed, odd))
                        accumulate(sums[r][2], b.mul(x_high, w_low))
                        if wide:
                            accumulate(sums[r][2], b.mul(x_low, w_high))
            for r in range(rows):
                first, second, high = (b.load(place) for place in sums[r])
                high = b.bitcast(high, numbers)
                first = b.add(first, b.shl(high, half))
                second = b.add(second, b.shl(b.lshr(high, half), half))
                for i, vector in enumerate((first, second)):
                    b.store(vector, _at(b, _add(b, out, 4 * LANES * i), numbers), align=8)
                out = b.add(out, out_step)
            return context.get_dummy_value()

        return types.void(starts, w, steps, n_steps, length, out, out_step), generate

    return tile


def _make_turn() -> Any:
    """Return turn(source, source_step, target, target_step, carry): transpose 4 x 4 numbers, steps in bytes.

    Each number x becomes x + ((x & carry) << 1); with carry = 2**31 that is the split form, whose low half is signed.
    """

    @intrinsic
    def turn(_: Any, source: Any, source_step: Any, target: Any, target_step: Any, carry: Any) -> Any:
        def generate(context: Any, b: Any, _: Any, arguments: Any) -> Any:
            source, source_step, target, target_step, carry = arguments
            numbers = ir.VectorType(ir.IntType(64), 4)
            index = ir.VectorType(ir.IntType(32), 4)

            def pick(one: Any, two: Any, lanes: list[int]) -> Any:
                return b.shuffle_vector(one, two, ir.Constant(index, lanes))

            none = ir.Constant(numbers, ir.Undefined)
            single = b.insert_element(none, carry, ir.Constant(ir.IntType(32), 0))
            mask = pick(single, none, [0] * 4)
            rows = []
            for _ in range(4):
                x = b.load(_at(b, source, numbers), align=8)
                rows.append(b.add(x, b.shl(b.and_(x, mask), _constant(numbers, 1))))
                source = b.add(source, source_step)
            pairs = [pick(rows[i], rows[i + 1], lanes) for i in (0, 2) for lanes in ([0, 4, 2, 6], [1, 5, 3, 7])]
            for lanes in ([0, 1, 4, 5], [2, 3, 6, 7]):
                for i in (0, 1):
                    b.store(pick(pairs[i], pairs[i + 2], lanes), _at(b, target, numbers), align=8)
                    target = b.add(target, target_step)
            return context.get_dummy_value()

        return types.void(source, source_step, target, target_step, carry), generate

    return turn


def _make_column() -> Any:
    """Return column(start, pieces, n, w, w_step, out): sum_i x_i w_i over n numbers, 4 channels side by side.

    x_i is at start + pieces[i] and w_i at w + i w_step, all in bytes.
    """

    @intrinsic
    def column(_: Any, start: Any, pieces: Any, n: Any, w: Any, w_step: Any, out: Any) -> Any:
        def generate(context: Any, b: Any, _: Any, arguments: Any) -> Any:
            start, pieces, n, w, w_step, out = arguments
            number = ir.IntType(64)
            numbers = ir.VectorType(number, 4)
            total = _variable(b, _constant(numbers, 0))
            with cgutils.for_range(b, n) as loop:
                piece = b.load(b.gep(_at(b, pieces, number), [loop.index]))
                x = b.load(_at(b, b.add(start, piece), numbers), align=8)
                weights = b.load(_at(b, b.add(w, b.mul(loop.index, w_step)), numbers), align=8)
                b.store(b.add(b.load(total), b.mul(x, weights)), total)
            b.store(b.load(total), _at(b, out, numbers), align=8)
            return context.get_dummy_value()

        return types.void(start, pieces, n, w, w_step, out), generate

    return column


def _others(i: int) -> list[int]:
    return [j for j in range(SIDE) if j != i]


def _make_spread() -> Any:
    """Return spread(source, row_step, column_step, target, target_step): 5 x 5 inputs to 36 factors, 4 channels."""

    @intrinsic
    def spread(_: Any, source: Any, row_step: Any, column_step: Any, target: Any, target_step: Any) -> Any:
        def generate(context: Any, b: Any, _: Any, arguments: Any) -> Any:
            source, row_step, column_step, target, target_step = arguments
            numbers = ir.VectorType(ir.IntType(64), 4)

            def transform(x: list[Any]) -> list[Any]:
                made = []
                for i, j in PRODUCTS:
                    value = x[i + j]
                    for k in _others(i) if i == j else []:
                        value = b.sub(value, x[i + k])
                    made.append(value)
                return made

            columns: list[list[Any]] = []
            for _ in range(2 * SIDE - 1):
                address, column = source, []
                for _ in range(2 * SIDE - 1):
                    column.append(b.load(_at(b, address, numbers), align=8))
                    address = b.add(address, row_step)
                columns.append(transform(column))
                source = b.add(source, column_step)
            for p in range(len(PRODUCTS)):
                for x in transform([column[p] for column in columns]):
                    carry = b.and_(x, _constant(numbers, 1 << 31))
                    x = b.add(x, b.shl(carry, _constant(numbers, 1)))
                    b.store(x, _at(b, target, numbers), align=8)
                    target = b.add(target, target_step)
            return context.get_dummy_value()

        return types.void(source, row_step, column_step, target, target_step), generate

    return spread


def _make_join() -> Any:
    """Return join(source, source_step, target, row_step, column_step): 36 products to 3 x 3 outputs, 4 channels."""

    @intrinsic
    def join(_: Any, source: Any, source_step: Any, target: Any, row_step: Any, column_step: Any) -> Any:
        def generate(context: Any, b: Any, _: Any, arguments: Any) -> Any:
            source, source_step, target, row_step, column_step = arguments
            numbers = ir.VectorType(ir.IntType(64), 4)

            def transform(products: list[Any]) -> list[Any]:
                made = []
                for i in range(SIDE):
                    value = products[i]
                    for j in _others(i):
                        value = b.add(value, products[PRODUCTS.index((min(i, j), max(i, j)))])
                    made.append(value)
                return made

            rows = []
            for _ in PRODUCTS:
                row = []
                for _ in PRODUCTS:
                    row.append(b.load(_at(b, source, numbers), align=8))
                    source = b.add(source, source_step)
                rows.append(transform(row))
            columns = [transform([row[j] for row in rows]) for j in range(SIDE)]
            for i in range(SIDE):
                address = target
                for j in range(SIDE):
                    b.store(columns[j][i], _at(b, address, numbers), align=8)
                    address = b.add(address, column_step)
                target = b.add(target, row_step)
            return context.get_dummy_value()

        return types.void(source, source_step, target, row_step, column_step), generate

    return join


if HAS_NUMBA:
    _tile1, _tile2, _tile3, _tile4 = (_make_tile(rows, wide=False) for rows in (1, 2, 3, 4))
    _wide1, _wide2, _wide3 = (_make_tile(rows, wide=True) for rows in (1, 2, 3))
    _turn, _column, _spread, _join = _make_turn(), _make_column(), _make_spread(), _make_join()


# ---- loops ---------------------------------------------------------------------------------------------------------


@_jit
def _address(array: NDArray[Any]) -> Any:
    # Signed: numba joins a signed and an unsigned variable to a float64.
    return np.int64(array.ctypes.data)


@_jit
def _tile(
    rows: int,
    wide: bool,
    starts: tuple[int, int, int, int],
    w: int,
    steps: int,
    n_steps: int,
    length: int,
    out: int,
    out_step: int,
) -> None:
    if wide:
        if rows == 3:
            _wide3(starts, w, steps, n_steps, length, out, out_step)
        elif rows == 2:
            _wide2(starts, w, steps, n_steps, length, out, out_step)
        else:
            _wide1(starts, w, steps, n_steps, length, out, out_step)
    elif rows == 4:
        _tile4(starts, w, steps, n_steps, length, out, out_step)
    elif rows == 3:
        _tile3(starts, w, steps, n_steps, length, out, out_step)
    elif rows == 2:
        _tile2(starts, w, steps, n_steps, length, out, out_step)
    else:
        _tile1(starts, w, steps, n_steps, length, out, out_step)


class _Steps(NamedTuple):
    """Distances, in numbers, of neighbours along each axis of an array: a part is one of several products."""

    part: int
    image: int
    line: int
    column: int
    channel: int


class _Grid(NamedTuple):
    """How many rows there are to multiply along each axis."""

    parts: int
    images: int
    lines: int
    columns: int


@_jit
def _scatter(tile: Ints, rows: int, lanes: int, out: Ints, tos: Ints, first: int, step: int) -> None:
    """Write a tile to channels that are `step` numbers apart."""
    if lanes == LANES and rows == TILE_ROWS and tos[3] - tos[0] == 3:
        for j in range(0, LANES, 4):
            _turn(_address(tile) + 8 * j, 8 * LANES, _address(out) + 8 * (tos[0] + first + j * step), 8 * step, 0)
    else:
        for r in range(rows):
            for j in range(lanes):
                out[tos[r] + first + j * step] = tile[LANES * r + j]


@_jit
def _multiply(
    x: Ints,
    x_step: _Steps,
    grid: _Grid,
    pieces: Ints,
    used: Ints,
    length: int,
    w: Words,
    wide: bool,
    out: Ints,
    out_step: _Steps,
    n_out: int,
) -> None:
    """Multiply the rows that the grid points at, in split form, by packed weights, part by part.

    A row is made of pieces of `length` numbers that begin `pieces` bytes after the point. In line i those from
    used[2 i] up to used[2 i + 1] are not all zero.
    """
    piece_words = LANES * length * (2 if wide else 1)
    words = len(pieces) * piece_words
    panels = (n_out + LANES - 1) // LANES
    most = TILE_ROWS_WIDE if wide else TILE_ROWS
    tile = np.empty(TILE_ROWS * LANES, np.int64)
    froms = np.zeros(BLOCK_ROWS + TILE_ROWS, np.int64)
    tos = np.zeros(BLOCK_ROWS + TILE_ROWS, np.int64)
    at_lines = np.zeros(BLOCK_ROWS + TILE_ROWS, np.int64)
    for part in range(grid.parts):
        image = line = column = 0
        todo = grid.images * grid.lines * grid.columns
        while todo > 0:
            count = min(BLOCK_ROWS, todo)
            todo -= count
            for b in range(count):
                at = part * x_step.part + image * x_step.image + line * x_step.line + column * x_step.column
                to = part * out_step.part + image * out_step.image + line * out_step.line + column * out_step.column
                froms[b] = _address(x) + 8 * at
                tos[b], at_lines[b] = to, line
                column += 1
                if column == grid.columns:
                    column = 0
                    line += 1
                    if line == grid.lines:
                        line = 0
                        image += 1
            for p in range(panels):
                panel = _address(w) + 4 * words * (part * panels + p)
                lanes = min(LANES, n_out - LANES * p)
                first = LANES * p * out_step.channel
                b = 0
                while b < count:
                    rows = min(most, count - b)
                    starts = (froms[b], froms[b + 1], froms[b + 2], froms[b + 3])
                    low, high = used[2 * at_lines[b]], used[2 * at_lines[b] + 1]
                    for r in range(b + 1, b + rows):
                        low, high = min(low, used[2 * at_lines[r]]), max(high, used[2 * at_lines[r] + 1])
                    at_panel, at_piece = panel + 4 * low * piece_words, _address(pieces) + 8 * low
                    # A whole vector goes to its place at once where channels are neighbours and rows evenly spaced.
                    direct = out_step.channel == 1 and lanes == LANES
                    to = _address(out) + 8 * (tos[b] + first) if direct else _address(tile)
                    to_step = 8 * (out_step.column if direct else LANES)
                    _tile(rows, wide, starts, at_panel, at_piece, high - low, length, to, to_step)
                    if not direct:
                        _scatter(tile, rows, lanes, out, tos[b : b + rows], first, out_step.channel)
                    b += rows


@_jit
def _split(x: Ints, target: Ints) -> None:
    """Write x in split form: the low words signed, with what they borrow added to the high ones."""
    for i in range(len(x)):
        target[i] = x[i] + ((x[i] & (1 << 31)) << 1)


@_jit
def _transpose(
    source: Ints, s: int, s_step: int, target: Ints, t: int, t_step: int, lines: int, columns: int, carry: int
) -> None:
    """Copy `lines` x `columns` numbers transposed, in the form that `carry` says (`_make_turn`)."""
    # The inner loop runs along whichever side has its lines further apart: powers of two there share cache sets.
    by_line = s_step >= t_step
    for a in range(0, (lines if by_line else columns) - 3, 4):
        for b in range(0, (columns if by_line else lines) - 3, 4):
            i, j = (a, b) if by_line else (b, a)
            from_ = _address(source) + 8 * (s + i * s_step + j)
            _turn(from_, 8 * s_step, _address(target) + 8 * (t + j * t_step + i), 8 * t_step, carry)
    for i in range(lines):
        for j in range(columns - columns % 4 if i < lines - lines % 4 else 0, columns):
            value = source[s + i * s_step + j]
            target[t + j * t_step + i] = value + ((value & carry) << 1)


@_jit
def _channels_last(
    x: Ints,
    shape: tuple[int, int, int, int],
    target: Ints,
    t_shape: tuple[int, int, int],
    corner: Pair,
    carry: int,
) -> None:
    """Lay out (n, c, h, w) as (n, *t_shape) with zeros around and channels last, the image at `corner`."""
    images, channels, lines, columns = shape
    t_lines, t_columns, t_channels = t_shape
    top, left = corner
    width = t_columns * t_channels
    for n in range(images):
        for y in range(t_lines):
            t = (n * t_lines + y) * width
            if y < top or y >= top + lines:
                target[t : t + width] = 0
            else:
                target[t : t + left * t_channels] = 0
                target[t + (left + columns) * t_channels : t + width] = 0
                s = (n * channels * lines + y - top) * columns
                _transpose(x, s, lines * columns, target, t + left * t_channels, t_channels, channels, columns, carry)


@_jit
def _spread_band(
    x: Ints, shape: tuple[int, int, int], lines: int, columns: int, first: int, count: int, factors: Ints, step: int
) -> None:
    """Make the 36 factors of `count` tiles, from line `first` of tiles on; an image has lines x columns tiles."""
    x_lines, x_columns, c = shape
    for t in range(count):
        image, line = divmod(first + t // columns, lines)
        at = ((image * x_lines + SIDE * line) * x_columns + SIDE * (t % columns)) * c
        for i in range(0, c, 4):
            to = _address(factors) + 8 * (t * c + i)
            _spread(_address(x) + 8 * (at + i), 8 * x_columns * c, 8 * c, to, 8 * step)


@_jit
def _join_band(
    products: Ints,
    step: int,
    tiles: Ints,
    lanes: int,
    lines: int,
    columns: int,
    first: int,
    count: int,
    out: Ints,
    shape: tuple[int, int, int],
) -> None:
    """Add the 36 products of `count` tiles up to the outputs, each image of `shape`, channels first."""
    n_out, out_lines, out_columns = shape
    width = SIDE * columns * lanes
    for t in range(count):
        at = SIDE * (t // columns * width + t % columns * lanes)
        for i in range(0, lanes, 4):
            _join(
                _address(products) + 8 * (t * lanes + i), 8 * step, _address(tiles) + 8 * (at + i), 8 * width, 8 * lanes
            )
    for t in range(SIDE * count // columns):
        image, line = divmod(SIDE * first + t, SIDE * lines)
        if line < out_lines:
            to = (image * n_out * out_lines + line) * out_columns
            _transpose(tiles, t * width, lanes, out, to, out_lines * out_columns, out_columns, n_out, 0)


@_jit
def _depthwise(
    x: Ints,
    x_step: _Steps,
    grid: _Grid,
    pieces: Ints,
    w: Ints,
    channels: int,
    line_of: Ints,
    out: Ints,
    out_step: _Steps,
) -> None:
    """Multiply channel by channel: w is (parts, pieces, channels rounded up to 4), `line_of` holds a line's outputs."""
    c = -(-channels // 4) * 4
    for part in range(grid.parts):
        for image in range(grid.images):
            for line in range(grid.lines):
                at = image * x_step.image + line * x_step.line
                for column in range(grid.columns):
                    for i in range(0, c, 4):
                        start = _address(x) + 8 * (at + column * x_step.column + i)
                        weights = _address(w) + 8 * (part * len(pieces) * c + i)
                        to = _address(line_of) + 8 * (column * c + i)
                        _column(start, _address(pieces), len(pieces), weights, 8 * c, to)
                first = part * out_step.part + image * out_step.image + line * out_step.line
                _transpose(line_of, 0, c, out, first, out_step.channel, grid.columns, channels, 0)


# ---- packing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Conv:
    """The public part of a convolution."""

    shape: tuple[int, int, int, int]
    stride: Pair
    pads: tuple[int, int, int, int]
    dilation: Pair
    groups: int

    def out_size(self, size: Pair) -> Pair:
        """Return the output's lines and columns for images of `size`."""
        top, left, bottom, right = self.pads
        made = []
        for axis, pad in enumerate((top + bottom, left + right)):
            reach = self.dilation[axis] * (self.shape[2 + axis] - 1) + 1
            made.append((size[axis] + pad - reach) // self.stride[axis] + 1)
        return made[0], made[1]


@dataclass(frozen=True)
class _Packed:
    """Matrices of weights as panels of 8 outputs: for each row, 8 low words, then 8 high words if wide."""

    words: Words
    wide: bool


def _pack(w: Ints) -> _Packed:
    """Pack matrices (..., K, N); every |weight| below 2**31 leaves out the high words."""
    low = w.astype(np.int32)
    wide = bool((low != w).any())
    n_out = w.shape[-1]
    halves = np.zeros((*w.shape[:-1], 1 + wide, -(-n_out // LANES) * LANES), np.int32)
    halves[..., 0, :n_out] = low
    if wide:
        # Wraps for the numbers next to 2**63, as it may: only the remainder modulo 2**32 counts.
        halves[..., 1, :n_out] = ((w - low) >> 32).astype(np.int32)
    panels = halves.reshape(*halves.shape[:-1], -1, LANES)[..., _LANE_ORDER]
    return _Packed(np.ascontiguousarray(np.moveaxis(panels, -2, -4)).reshape(-1), wide)


def _pack_tiles(w: Ints) -> _Packed:
    """Pack (O, C, 3, 3) weights as the 36 matrices (C rounded up to 4, O) of `_conv_karatsuba`."""
    for axis in (2, 3):
        parts = np.split(w, SIDE, axis)
        w = np.concatenate([parts[i] if i == j else parts[i] + parts[j] for i, j in PRODUCTS], axis)
    n_out, c = w.shape[:2]
    matrices = np.zeros((36, -(-c // 4) * 4, n_out), np.int64)
    matrices[:, :c] = w.reshape(n_out, c, 36).transpose(2, 1, 0)
    return _pack(matrices)


def _pack_columns(w: Ints, conv: _Conv) -> Ints:
    """Pack (O, 1, kh, kw) weights as `_depthwise` reads them."""
    columns = np.zeros((w.shape[0] // conv.groups, w.shape[2] * w.shape[3], -(-conv.groups // 4) * 4), np.int64)
    columns[..., : conv.groups] = w.reshape(conv.groups, *columns.shape[:2]).transpose(1, 2, 0)
    return columns.reshape(-1)


def _buffer(name: str, size: int) -> Ints:
    """Return this thread's buffer of that name, with room for `size` numbers of any value."""
    found: Ints | None = getattr(_local, name, None)
    if found is None or found.size < size:
        found = np.empty(size, np.int64)
        setattr(_local, name, found)
    return found


# ---- products ------------------------------------------------------------------------------------------------------


Fill = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class _Method:
    """One way to multiply by certain weights: fill(x, out) writes the product of x to out, which is contiguous."""

    nbytes: int
    fill: Fill


def _flat(x: Tensor) -> Ints:
    flat: Ints = x.numpy().reshape(-1)
    return flat


def _matmul_tiles(packed: _Packed, shape: Pair, x: Tensor, out: Tensor) -> None:
    k, n_out = shape
    source, target = _flat(x), _flat(out)
    chunk = max(1, CHUNK_BYTES // (8 * k))
    for first in range(0, source.size // k, chunk):
        some = source[first * k : (first + chunk) * k]
        split = _buffer("input", some.size)
        _split(some, split)
        _multiply(
            split,
            _Steps(0, 0, 0, k, 1),
            _Grid(1, 1, 1, some.size // k),
            _AT_ONCE,
            _ALL,
            k,
            packed.words,
            packed.wide,
            target[first * n_out :],
            _Steps(0, 0, 0, n_out, 1),
            n_out,
        )


@lru_cache(maxsize=256)
def _pieces(conv: _Conv, lines: int, columns: int, channels: int) -> tuple[Ints, Ints, int]:
    """Return pieces, used and length for `_multiply`: one piece for each line of the kernel, or for each weight.

    Args:
        conv: the convolution.
        lines: lines of the image, without padding.
        columns: columns of the image, with padding.
        channels: numbers from one column to the next.
    """
    _, depth, kernel_lines, kernel_columns = conv.shape
    whole = conv.groups == 1 and conv.dilation[1] == 1
    each = range(0, 1 if whole else kernel_columns * conv.dilation[1], conv.dilation[1])
    pieces = [(i * conv.dilation[0] * columns + j) * channels for i in range(kernel_lines) for j in each]
    used = []
    for y in range(conv.out_size((lines, columns))[0]):
        at = [y * conv.stride[0] + i * conv.dilation[0] - conv.pads[0] for i in range(kernel_lines)]
        inside = [i for i in range(kernel_lines) if 0 <= at[i] < lines] or [0]
        used += [inside[0] * len(each), (inside[-1] + 1) * len(each)]
    return 8 * np.array(pieces, np.int64), np.array(used, np.int64), kernel_columns * depth if whole else depth


def _lay(conv: _Conv, x: Tensor, channels: int, carry: int) -> tuple[Ints, _Steps, _Grid]:
    """Lay x out for a convolution; return it with the steps and the grid of its rows."""
    images, depth, lines, columns = x.shape
    top, left, bottom, right = conv.pads
    padded = (lines + top + bottom, columns + left + right, channels)
    width = padded[1] * channels
    laid = _buffer("input", images * padded[0] * width)
    _channels_last(_flat(x), (images, depth, lines, columns), laid, padded, (top, left), carry)
    step = _Steps(conv.shape[1], padded[0] * width, conv.stride[0] * width, conv.stride[1] * channels, 1)
    return laid, step, _Grid(conv.groups, images, *conv.out_size((lines, columns)))


def _conv_tiles(packed: _Packed, conv: _Conv, x: Tensor, out: Tensor) -> None:
    channels, lines, columns = x.shape[1:]
    laid, step, grid = _lay(conv, x, channels, 1 << 31)
    pieces, used, length = _pieces(conv, lines, columns + conv.pads[1] + conv.pads[3], channels)
    n_out, area = conv.shape[0], grid.lines * grid.columns
    share = n_out // conv.groups
    out_step = _Steps(share * area, n_out * area, grid.columns, 1, area)
    _multiply(laid, step, grid, pieces, used, length, packed.words, packed.wide, _flat(out), out_step, share)


def _conv_depthwise(w: Ints, conv: _Conv, x: Tensor, out: Tensor) -> None:
    channels, lines, columns = x.shape[1:]
    c = -(-channels // 4) * 4
    laid, step, grid = _lay(conv, x, c, 0)
    pieces, _, _ = _pieces(conv, lines, columns + conv.pads[1] + conv.pads[3], c)
    area, share = grid.lines * grid.columns, conv.shape[0] // channels
    out_step = _Steps(area, conv.shape[0] * area, grid.columns, 1, share * area)
    line_of = _buffer("tiles", grid.columns * c)
    _depthwise(laid, step, grid._replace(parts=share), pieces, w, channels, line_of, _flat(out), out_step)


def _apart(size: int) -> int:
    """Return at least `size` numbers, an odd count of cache lines: so far apart, 36 streams do not collide."""
    return 8 * (-(-size // 8) | 1)


def _conv_karatsuba(packed: _Packed, conv: _Conv, x: Tensor, out: Tensor) -> None:
    images, channels, *size = x.shape
    n_out, *out_size = out.shape[1:]
    lines, columns = (-(-s // SIDE) for s in out_size)
    c, lanes = -(-channels // 4) * 4, -(-n_out // LANES) * LANES
    padded = (SIDE * lines + 2, SIDE * columns + 2, c)
    laid = _buffer("input", images * padded[0] * padded[1] * c)
    _channels_last(_flat(x), (images, channels, size[0], size[1]), laid, padded, conv.pads[:2], 0)
    band = min(images * lines, -(-BAND_TILES // columns))
    factor_step, product_step = _apart(band * columns * c), _apart(band * columns * lanes)
    factors, products = _buffer("factors", 36 * factor_step), _buffer("products", 36 * product_step)
    tiles = _buffer("tiles", 9 * band * columns * lanes)
    for first in range(0, images * lines, band):
        count = min(band, images * lines - first) * columns
        _spread_band(laid, padded, lines, columns, first, count, factors, factor_step)
        _multiply(
            factors,
            _Steps(factor_step, 0, 0, c, 1),
            _Grid(36, 1, 1, count),
            _AT_ONCE,
            _ALL,
            c,
            packed.words,
            packed.wide,
            products,
            _Steps(product_step, 0, 0, lanes, 1),
            lanes,
        )
        shape = n_out, out_size[0], out_size[1]
        _join_band(products, product_step, tiles, lanes, lines, columns, first, count, _flat(out), shape)


def _limbs(x: Tensor, bits: int) -> list[Tensor]:
    """Return signed limbs of x, the lowest first: x = sum_i limb_i 2**(i bits) modulo 2**64."""
    made = []
    for _ in range(0, 64, bits):
        made.append((x << (64 - bits)) >> (64 - bits))
        x = (x - made[-1]) >> min(bits, 63)
    return made


def _limbs_product(w: Tensor, axes: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]) -> _Method:
    """Prepare a product in float64; `axes` of w are those that its sums run along.

    Limbs of x have so few bits that no partial sum passes 2**53: in whatever order BLAS adds, it rounds nothing.
    """
    small = int(w.min()) >= -(2**25) and int(w.max()) <= 2**25
    w_bits = 64 if small else 22
    parts = [part.double() for part in _limbs(w, w_bits)]
    most = max(int(part.abs().sum(axes).max()) for part in parts)
    bits = min(32, 54 - (max(most, 2) - 1).bit_length())

    def fill(x: Tensor, out: Tensor) -> None:
        out.zero_()
        for i, limb in enumerate(_limbs(x, bits)):
            for j, part in enumerate(parts):
                if (shift := i * bits + j * w_bits) < 64:
                    out += product(limb.double(), part).to(torch.int64) << shift

    return _Method(sum(8 * part.numel() for part in parts), fill)


def _conv_limbs(conv: _Conv, x: Tensor, w: Tensor) -> Tensor:
    top, left, bottom, right = conv.pads
    return F.conv2d(F.pad(x, (left, right, top, bottom)), w, None, conv.stride, 0, conv.dilation, conv.groups)


def _conv_method(w: Tensor, conv: _Conv, name: str) -> _Method:
    if name == "limbs":
        return _limbs_product(w, (1, 2, 3), partial(_conv_limbs, conv))
    weights: Ints = w.numpy()
    if name == "depthwise":
        columns = _pack_columns(weights, conv)
        return _Method(columns.nbytes, partial(_conv_depthwise, columns, conv))
    if name == "karatsuba":
        packed = _pack_tiles(weights)
        return _Method(packed.words.nbytes, partial(_conv_karatsuba, packed, conv))
    n_out, depth, *kernel = conv.shape
    matrices = weights.reshape(conv.groups, -1, depth, *kernel).transpose(0, 3, 4, 2, 1)
    packed = _pack(matrices.reshape(conv.groups, -1, n_out // conv.groups))
    return _Method(packed.words.nbytes, partial(_conv_tiles, packed, conv))


def _conv_choice(conv: _Conv, size: Pair | None) -> str:
    """Return the quickest method for images of `size`, by the times that `benchmarks/kernels.py` takes."""
    n_out, depth, *_ = conv.shape
    if BACKEND == "torch":
        return "limbs"
    if _fits("depthwise", conv) and n_out < LANES * conv.groups:
        return "depthwise"
    if size is not None and min(n_out, depth) >= 32 and _fits("karatsuba", conv):
        lines, columns = conv.out_size(size)
        tiles = -(-lines // SIDE) * -(-columns // SIDE)
        # Tiles must be full enough, and enough of them to pay for reading four times as many packed weights.
        if tiles >= 4 and 2 * lines * columns > 11 * tiles:
            return "karatsuba"
    return "tiles"


def _fits(name: str, conv: _Conv) -> bool:
    if BACKEND == "torch":
        return name == "limbs"
    if name == "depthwise":
        return conv.shape[1] == 1 < conv.groups
    if name == "karatsuba":
        return conv.shape[2:] == (SIDE, SIDE) and conv.stride == conv.dilation == (1, 1) and conv.groups == 1
    return name in ("tiles", "limbs")


# ---- public --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Weights in the form that their product wants; made once, used for many inputs, by any number of threads.

    Args:
        method: how it multiplies, one of METHODS.
        nbytes: memory that the packed weights take.
        apply: the product of an int64 input, of a shape as `matmul` or `conv2d` say, with these weights.
    """

    method: str
    nbytes: int
    apply: Callable[[Tensor], Tensor]


def _check_weights(w: Tensor, axes: int) -> None:
    if w.dtype != torch.int64 or w.dim() != axes or not w.numel():
        raise ShapeError(f"weights must be int64 of {axes} axes, not empty; got {w.dtype} of shape {tuple(w.shape)}")


def _check_conv(conv: _Conv) -> None:
    if min(*conv.stride, *conv.dilation, conv.groups) < 1 or min(conv.pads) < 0:
        raise ShapeError(f"stride, dilation, groups must be 1 or more, pads 0 or more; got {conv}")
    if conv.shape[0] % conv.groups:
        raise ShapeError(f"output channels must be a multiple of groups; got {conv.shape[0]} and {conv.groups}")


def prepare_matmul(w: Tensor, *, method: str | None = None) -> Prepared:
    """Pack w (int64, (K, N)) for many products x @ w; all weights in [-2**31, 2**31) make them faster.

    Args:
        w: weights.
        method: "tiles" or "limbs", to have that one instead of the quickest.

    Raises:
        ShapeError: w is not an int64 matrix, or there is no such method.
    """
    _check_weights(w, 2)
    k, n_out = w.shape
    name = method or ("limbs" if BACKEND == "torch" else "tiles")
    if name == "limbs":
        made = _limbs_product(w, (0,), torch.matmul)
    elif name == "tiles" and BACKEND == "numba":
        packed = _pack(w.numpy())
        made = _Method(packed.words.nbytes, partial(_matmul_tiles, packed, (k, n_out)))
    else:
        raise ShapeError(f"the method must be limbs or, with numba, tiles; got {name!r}")

    def apply(x: Tensor) -> Tensor:
        if x.dtype != torch.int64 or not x.dim() or x.shape[-1] != k:
            raise ShapeError(f"an input must be int64 of shape (..., {k}); got {x.dtype} of shape {tuple(x.shape)}")
        out = torch.empty(*x.shape[:-1], n_out, dtype=torch.int64)
        made.fill(x, out)
        return out

    return Prepared(name, made.nbytes, apply)


def prepare_conv2d(
    w: Tensor,
    *,
    stride: Pair = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    size: Pair | None = None,
    method: str | None = None,
) -> Prepared:
    """Pack w (int64, (O, C / groups, kh, kw)) for many convolutions with it.

    Args:
        w: weights; all in [-2**31, 2**31), or for 3x3 kernels in [-2**29, 2**29), make it faster.
        stride: (lines, columns).
        pads: zeros around the image: (top, left, bottom, right).
        dilation: (lines, columns).
        groups: number of groups.
        size: lines and columns of the images to come, which decide the method; other sizes come out right too.
        method: one of METHODS, to have that one instead of the quickest.

    Raises:
        ShapeError: w or an attribute does not describe a convolution, or not one that the method is for.
    """
    _check_weights(w, 4)
    shape = (w.shape[0], w.shape[1], w.shape[2], w.shape[3])
    conv = _Conv(shape, (stride[0], stride[1]), pads, (dilation[0], dilation[1]), groups)
    _check_conv(conv)
    name = method or _conv_choice(conv, size)
    if not _fits(name, conv):
        raise ShapeError(f"the method must be one of {METHODS} that serves such a convolution; got {name!r} for {conv}")
    made = _conv_method(w, conv, name)
    return Prepared(name, made.nbytes, partial(_convolve, conv, made.fill))


def _convolve(conv: _Conv, fill: Fill, x: Tensor) -> Tensor:
    """Convolve chunk by chunk of the batch, so that memory beyond input and output stays bounded."""
    channels = conv.shape[1] * conv.groups
    if x.dtype != torch.int64 or x.dim() != 4 or x.shape[1] != channels:
        raise ShapeError(f"an input must be int64 (n, {channels}, h, w); got {x.dtype} of shape {tuple(x.shape)}")
    lines, columns = conv.out_size((x.shape[2], x.shape[3]))
    if lines < 1 or columns < 1:
        raise ShapeError(f"images must be as large as the kernel; got {tuple(x.shape[2:])} for {conv}")
    out = torch.empty(x.shape[0], conv.shape[0], lines, columns, dtype=torch.int64)
    top, left, bottom, right = conv.pads
    numbers = channels * (x.shape[2] + top + bottom) * (x.shape[3] + left + right)
    chunk = max(1, CHUNK_BYTES // (8 * numbers))
    for first in range(0, x.shape[0], chunk):
        fill(x[first : first + chunk], out[first : first + chunk])
    return out


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """Return x @ w modulo 2**64.

    Args:
        x: int64, (..., K).
        w: int64, (K, N); `prepare_matmul` spares the work on a w that is used again.

    Returns:
        int64, (..., N).

    Raises:
        ShapeError: a factor is not int64, or the shapes do not fit.
    """
    return prepare_matmul(w).apply(x)


def conv2d(
    x: Tensor,
    w: Tensor,
    *,
    stride: Pair = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return the 2-D convolution (no flip) of x and w modulo 2**64.

    Args:
        x: int64, (n, C, H, W).
        w: int64, (O, C / groups, kh, kw); `prepare_conv2d` spares the work on a w that is used again.
        stride: (lines, columns).
        pads: zeros around the image: (top, left, bottom, right).
        dilation: (lines, columns).
        groups: number of groups.

    Returns:
        int64, (n, O, H', W') with H' = (H + top + bottom - dilation (kh - 1) - 1) // stride + 1, and W' likewise.

    Raises:
        ShapeError: a factor is not int64, or the shapes do not fit.
    """
    size = (x.shape[2], x.shape[3]) if x.dim() == 4 else None
    made = prepare_conv2d(w, stride=stride, pads=pads, dilation=dilation, groups=groups, size=size)
    return made.apply(x)


def warm() -> None:
    """Compile every loop, or load it from numba's cache, so that no product has to. Say if there is no numba."""
    if BACKEND == "torch":
        _log.warning("no numba for this machine: products in the ring run several times slower, in torch")
        return
    x, one = torch.zeros(1, 4, 3, 3, dtype=torch.int64), torch.ones((), dtype=torch.int64)
    matmul(x, one.expand(3, 8))
    prepare_conv2d(one.expand(8, 4, 3, 3), method="karatsuba").apply(x)
    prepare_conv2d(one.expand(4, 1, 3, 3), groups=4, method="depthwise").apply(x)
