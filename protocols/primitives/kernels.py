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

The inner loops are LLVM vectors compiled by numba, correct on every little-endian CPU; a big-endian one is refused.
Weights on torch's meta device have products of the right shape, without values, there. Numba keeps compiled code
beside this file or, where that is read-only, in the user's cache folder; NUMBA_CACHE_DIR names another one. `warm()`
compiles or loads all of it: call it before anything is timed.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from protocols.errors import ShapeError, UnsupportedError
from protocols.primitives.kernels_numba import (
    LANES,
    PRODUCTS,
    SIDE,
    Grid,
    Ints,
    Pair,
    Steps,
    Words,
    channels_last,
    depthwise,
    join_band,
    multiply,
    split_words,
    spread_band,
)

# Bytes of one chunk of the batch, laid out for the product. Memory is bounded by this or by one image.
CHUNK_BYTES = 1 << 23
# Tiles of 3x3 outputs under way at a time: enough for the packed weights to be read seldom.
BAND_TILES = 48
# Ways to convolve.
METHODS = ("tiles", "karatsuba", "depthwise")
# Even lanes of a panel accumulate outputs 0 to 3, odd ones 4 to 7, so that both halves leave as whole vectors.
_LANE_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]

# A row in one piece that is always used.
_AT_ONCE, _ALL = np.zeros(1, np.int64), np.array([0, 1], np.int64)
_local = threading.local()


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
    """Pack (O, 1, kh, kw) weights as `depthwise` reads them."""
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


# Of weights that have a shape alone.
_NO_VALUES = _Method(0, lambda x, out: None)


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
        split_words(some, split)
        multiply(
            split,
            Steps(0, 0, 0, k, 1),
            Grid(1, 1, 1, some.size // k),
            _AT_ONCE,
            _ALL,
            k,
            packed.words,
            packed.wide,
            target[first * n_out :],
            Steps(0, 0, 0, n_out, 1),
            n_out,
        )


@lru_cache(maxsize=256)
def _pieces(conv: _Conv, lines: int, columns: int, channels: int) -> tuple[Ints, Ints, int]:
    """Return pieces, used and length for `multiply`: one piece for each line of the kernel, or for each weight.

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


def _lay(conv: _Conv, x: Tensor, channels: int, carry: int) -> tuple[Ints, Steps, Grid]:
    """Lay x out for a convolution; return it with the steps and the grid of its rows."""
    images, depth, lines, columns = x.shape
    top, left, bottom, right = conv.pads
    padded = (lines + top + bottom, columns + left + right, channels)
    width = padded[1] * channels
    laid = _buffer("input", images * padded[0] * width)
    channels_last(_flat(x), (images, depth, lines, columns), laid, padded, (top, left), carry)
    step = Steps(conv.shape[1], padded[0] * width, conv.stride[0] * width, conv.stride[1] * channels, 1)
    return laid, step, Grid(conv.groups, images, *conv.out_size((lines, columns)))


def _conv_tiles(packed: _Packed, conv: _Conv, x: Tensor, out: Tensor) -> None:
    channels, lines, columns = x.shape[1:]
    laid, step, grid = _lay(conv, x, channels, 1 << 31)
    pieces, used, length = _pieces(conv, lines, columns + conv.pads[1] + conv.pads[3], channels)
    n_out, area = conv.shape[0], grid.lines * grid.columns
    share = n_out // conv.groups
    out_step = Steps(share * area, n_out * area, grid.columns, 1, area)
    multiply(laid, step, grid, pieces, used, length, packed.words, packed.wide, _flat(out), out_step, share)


def _conv_depthwise(w: Ints, conv: _Conv, x: Tensor, out: Tensor) -> None:
    channels, lines, columns = x.shape[1:]
    c = -(-channels // 4) * 4
    laid, step, grid = _lay(conv, x, c, 0)
    pieces, _, _ = _pieces(conv, lines, columns + conv.pads[1] + conv.pads[3], c)
    area, share = grid.lines * grid.columns, conv.shape[0] // channels
    out_step = Steps(area, conv.shape[0] * area, grid.columns, 1, share * area)
    line_of = _buffer("tiles", grid.columns * c)
    depthwise(laid, step, grid._replace(parts=share), pieces, w, channels, line_of, _flat(out), out_step)


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
    channels_last(_flat(x), (images, channels, size[0], size[1]), laid, padded, conv.pads[:2], 0)
    band = min(images * lines, -(-BAND_TILES // columns))
    factor_step, product_step = _apart(band * columns * c), _apart(band * columns * lanes)
    factors, products = _buffer("factors", 36 * factor_step), _buffer("products", 36 * product_step)
    tiles = _buffer("tiles", 9 * band * columns * lanes)
    for first in range(0, images * lines, band):
        count = min(band, images * lines - first) * columns
        spread_band(laid, padded, lines, columns, first, count, factors, factor_step)
        multiply(
            factors,
            Steps(factor_step, 0, 0, c, 1),
            Grid(36, 1, 1, count),
            _AT_ONCE,
            _ALL,
            c,
            packed.words,
            packed.wide,
            products,
            Steps(product_step, 0, 0, lanes, 1),
            lanes,
        )
        shape = n_out, out_size[0], out_size[1]
        join_band(products, product_step, tiles, lanes, lines, columns, first, count, _flat(out), shape)


def _conv_method(w: Tensor, conv: _Conv, name: str) -> _Method:
    if w.is_meta:
        return _NO_VALUES
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
    if name == "depthwise":
        return conv.shape[1] == 1 < conv.groups
    if name == "karatsuba":
        return conv.shape[2:] == (SIDE, SIDE) and conv.stride == conv.dilation == (1, 1) and conv.groups == 1
    return name == "tiles"


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
    if sys.byteorder != "little":
        # Numbers are read as pairs of words, the low one first.
        raise UnsupportedError("products in the ring must be made by a little-endian processor")
    if w.dtype != torch.int64 or w.dim() != axes or not w.numel():
        raise ShapeError(f"weights must be int64 of {axes} axes, not empty; got {w.dtype} of shape {tuple(w.shape)}")


def _check_conv(conv: _Conv) -> None:
    if min(*conv.stride, *conv.dilation, conv.groups) < 1 or min(conv.pads) < 0:
        raise ShapeError(f"stride, dilation, groups must be 1 or more, pads 0 or more; got {conv}")
    if conv.shape[0] % conv.groups:
        raise ShapeError(f"output channels must be a multiple of groups; got {conv.shape[0]} and {conv.groups}")


def prepare_matmul(w: Tensor) -> Prepared:
    """Pack w (int64, (K, N)) for many products x @ w; all weights in [-2**31, 2**31) make them faster.

    Args:
        w: weights.

    Raises:
        ShapeError: w is not an int64 matrix.
        UnsupportedError: this processor is big-endian.
    """
    _check_weights(w, 2)
    k, n_out = w.shape
    made = _NO_VALUES
    if not w.is_meta:
        packed = _pack(w.numpy())
        made = _Method(packed.words.nbytes, partial(_matmul_tiles, packed, (k, n_out)))

    def apply(x: Tensor) -> Tensor:
        if x.dtype != torch.int64 or not x.dim() or x.shape[-1] != k:
            raise ShapeError(f"an input must be int64 of shape (..., {k}); got {x.dtype} of shape {tuple(x.shape)}")
        out = torch.empty(*x.shape[:-1], n_out, dtype=torch.int64, device=x.device)
        made.fill(x, out)
        return out

    return Prepared("tiles", made.nbytes, apply)


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
        UnsupportedError: this processor is big-endian.
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
    out = torch.empty(x.shape[0], conv.shape[0], lines, columns, dtype=torch.int64, device=x.device)
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
    """Compile every loop, or load it from numba's cache, so that no product has to."""
    x, one = torch.zeros(1, 4, 3, 3, dtype=torch.int64), torch.ones((), dtype=torch.int64)
    matmul(x, one.expand(3, 8))
    prepare_conv2d(one.expand(8, 4, 3, 3), method="karatsuba").apply(x)
    prepare_conv2d(one.expand(4, 1, 3, 3), groups=4, method="depthwise").apply(x)
