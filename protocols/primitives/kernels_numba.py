"""The loops of `kernels`, as LLVM vectors compiled by numba: correct on every little-endian CPU.

Matrices are multiplied in tiles of a few rows and one panel of packed weights; every loop here works on flat int64
arrays, in place, and releases the interpreter.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from protocols.primitives.loops import compiled

Ints = NDArray[np.int64]
Words = NDArray[np.int32]
Pair = tuple[int, int]

# Outputs of one panel of packed weights: an AVX2 vector of 32-bit words.
LANES = 8
# Rows (pixels) that one tile multiplies with a panel: as many as 16 vector registers hold accumulators for.
TILE_ROWS, TILE_ROWS_WIDE = 4, 3
# Rows that go through all panels before the next: a multiple of both, small enough to stay in the L2 cache.
BLOCK_ROWS = 48
# The six products of one axis of a 3x3 tile: i = j stands for weight i alone, i < j for the sum of two.
PRODUCTS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
SIDE = 3


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


def _load_each(b: Any, address: Any, step: Any, n: int) -> tuple[list[Any], Any]:
    """Load n vectors of 4 numbers, `step` bytes apart; return them and the address behind them."""
    numbers, made = ir.VectorType(ir.IntType(64), 4), []
    for _ in range(n):
        made.append(b.load(_at(b, address, numbers), align=8))
        address = b.add(address, step)
    return made, address


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
                column, _ = _load_each(b, source, row_step, 2 * SIDE - 1)
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
                row, source = _load_each(b, source, source_step, len(PRODUCTS))
                rows.append(transform(row))
            columns = [transform([row[j] for row in rows]) for j in range(SIDE)]
            for i in range(SIDE):
                address = target
                for j in range(SIDE):
                    b.store(columns[j][i], _at(b, address, columns[j][i].type), align=8)
                    address = b.add(address, column_step)
                target = b.add(target, row_step)
            return context.get_dummy_value()

        return types.void(source, source_step, target, row_step, column_step), generate

    return join


_tile1, _tile2, _tile3, _tile4 = (_make_tile(rows, wide=False) for rows in (1, 2, 3, 4))
_wide1, _wide2, _wide3 = (_make_tile(rows, wide=True) for rows in (1, 2, 3))
_turn, _column, _spread, _join = _make_turn(), _make_column(), _make_spread(), _make_join()


# ---- loops ---------------------------------------------------------------------------------------------------------


@compiled()
def _address(array: NDArray[Any]) -> Any:
    # Signed: numba joins a signed and an unsigned variable to a float64.
    return np.int64(array.ctypes.data)


@compiled()
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


class Steps(NamedTuple):
    """Distances, in numbers, of neighbours along each axis of an array: a part is one of several products."""

    part: int
    image: int
    line: int
    column: int
    channel: int


class Grid(NamedTuple):
    """How many rows there are to multiply along each axis."""

    parts: int
    images: int
    lines: int
    columns: int


@compiled()
def _scatter(tile: Ints, rows: int, lanes: int, out: Ints, tos: Ints, first: int, step: int) -> None:
    """Write a tile to channels that are `step` numbers apart."""
    if lanes == LANES and rows == TILE_ROWS and tos[3] - tos[0] == 3:
        for j in range(0, LANES, 4):
            _turn(_address(tile) + 8 * j, 8 * LANES, _address(out) + 8 * (tos[0] + first + j * step), 8 * step, 0)
    else:
        for r in range(rows):
            for j in range(lanes):
                out[tos[r] + first + j * step] = tile[LANES * r + j]


@compiled()
def multiply(
    x: Ints,
    x_step: Steps,
    grid: Grid,
    pieces: Ints,
    used: Ints,
    length: int,
    w: Words,
    wide: bool,
    out: Ints,
    out_step: Steps,
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


@compiled()
def split_words(x: Ints, target: Ints) -> None:
    """Write x in split form: the low words signed, with what they borrow added to the high ones."""
    for i in range(len(x)):
        target[i] = x[i] + ((x[i] & (1 << 31)) << 1)


@compiled()
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


@compiled()
def channels_last(
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


@compiled()
def spread_band(
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


@compiled()
def join_band(
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


@compiled()
def depthwise(
    x: Ints,
    x_step: Steps,
    grid: Grid,
    pieces: Ints,
    w: Ints,
    channels: int,
    line_of: Ints,
    out: Ints,
    out_step: Steps,
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
