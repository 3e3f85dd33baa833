"""A CrypTen tensor type whose operations are our protocols, for programs that call CrypTen themselves.

`ComparedTensor` is registered with CrypTen as "securemtk". Its comparisons, ReLU and maxima are those of `compare`, its
products with weights those of `reused`; whatever else CrypTen has, runs as CrypTen wrote it, on the same shares, over
our communicator and dealer (`engine`).

Comparisons take values as integers of 32 bits: in fixed point, compared values and their differences must stay
below 2**15 in magnitude. CrypTen's circuits read all 64 bits, for more rounds and bytes.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protocols.crypten import door
from protocols.errors import UnsupportedError
from protocols.primitives import kernels, ring
from protocols.two_party import beaver, compare, reused_masks
from protocols.two_party.party import Party, truncate
from protocols.two_party.reused_masks import Weights

crypten = door.crypten
MPCTensor = crypten.mpc.MPCTensor
ARITHMETIC = crypten.mpc.arithmetic
TYPES = {"fss": "securemtk", "crypten": "mpc"}


def _pair(value: Any) -> tuple[int, int]:
    low, high = (value, value) if isinstance(value, int) else value
    return int(low), int(high)


def _largest(columns: Tensor) -> Tensor:
    """Return the maxima along the first axis, by a tree of pairs: 2 rounds a level."""
    party = door.current()
    while len(columns) > 1:
        columns = compare.max_of_pairs(party, columns, 0)
    return columns[0]


def _negative(share: Tensor) -> Tensor:
    """Return a sharing of [share < 0] as the integer 0 or 1."""
    return compare.is_negative(door.current(), share)


class ComparedTensor(MPCTensor):  # type: ignore[misc, valid-type]
    """CrypTen's MPCTensor with our protocols; made by `crypten.cryptensor` inside `using`.

    Cost, for each of n elements: ReLU, |x| and a comparison 2 rounds, 16 bytes and 2 bits; ==, != twice that many
    bytes; a maximum over w values 2 ceil(log2 w) rounds. Security: as the functions of `compare` and `reused`.
    """

    # CrypTen asks its settings at every attribute whether to reveal and check values, which takes half of a small
    # prediction's computing; here nothing is revealed for a check.
    __getattribute__ = MPCTensor.__getattribute__.__wrapped__

    # --- CrypTen's own makers would return an MPCTensor ---

    @classmethod
    def _made(cls, tensor: Any, ptype: Any = ARITHMETIC) -> "ComparedTensor":
        result = object.__new__(cls)
        crypten.CrypTensor.__init__(result)
        result._tensor, result.ptype = tensor, ptype
        return result

    @classmethod
    def new(cls, *args: Any, **kwargs: Any) -> "ComparedTensor":
        """Return a new tensor; as the constructor."""
        return cls(*args, **kwargs)

    @classmethod
    def from_shares(cls, share: Tensor, precision: int | None = None, ptype: Any = ARITHMETIC) -> "ComparedTensor":
        """Return this party's share as a tensor."""
        return cls._made(ptype.to_tensor().from_shares(share, precision=precision), ptype)

    @classmethod
    def rand(cls, *sizes: Any, device: Any = None) -> "ComparedTensor":
        """Return a shared tensor, uniform in [0, 1)."""
        drawn = MPCTensor.rand(*sizes, device=device)
        return cls._made(drawn._tensor, drawn.ptype)

    def clone(self) -> "ComparedTensor":
        """Return a copy."""
        return self._made(self._tensor.clone(), self.ptype)

    def shallow_copy(self) -> "ComparedTensor":
        """Return another object on the same share."""
        return self._made(self._tensor, self.ptype)

    def _with(self, share: Tensor) -> "ComparedTensor":
        """Return a share at the scale of this tensor."""
        tensor = self._tensor.shallow_copy()
        tensor.share = share
        return self._made(tensor)

    def _additive(self) -> "ComparedTensor":
        tensor: ComparedTensor = self.to(ARITHMETIC)
        return tensor

    # --- comparisons ---

    def _ltz(self) -> "ComparedTensor":
        """Return [self < 0], on which all of CrypTen's inequalities rest: 2 rounds."""
        return self.from_shares(_negative(self._additive().share), precision=0)

    def ne(self, y: Any) -> "ComparedTensor":
        """Return [self != y]: 2 rounds, two comparisons."""
        difference = (self - y)._additive().share
        return self.from_shares(_negative(torch.stack([difference, -difference])).sum(0), precision=0)

    def eq(self, y: Any) -> Any:
        """Return [self == y]: 2 rounds, two comparisons."""
        return 1 - self.ne(y)

    def relu(self) -> "ComparedTensor":
        """Return max(self, 0): 2 rounds."""
        own = self._additive()
        return own._with(compare.relu(door.current(), own.share, 0))

    def abs(self) -> "ComparedTensor":
        """Return |self| = 2 relu(self) - self: 2 rounds."""
        own = self._additive()
        return own._with(2 * own.relu().share - own.share)

    # --- maxima ---

    def max(self, dim: int | None = None, keepdim: bool = False, one_hot: bool = True) -> Any:
        """Return the maximum of all, or (maxima, their places) along `dim`; of equal ones the first is the maximum.

        Args:
            dim: axis; None for all elements.
            keepdim: whether `dim` stays, with one element.
            one_hot: whether places are 1 among 0 in the shape of this tensor, or indices.

        Cost: 2 ceil(log2 w) rounds for the maxima, 5 for the places.
        """
        own = self._additive()
        if dim is None:
            return own._with(_largest(own.share.flatten()))
        best = _largest(own.share.movedim(dim, 0)).unsqueeze(dim)
        first = own._first(best, dim)
        return own._with(best if keepdim else best.squeeze(dim)), self._places(first, dim, keepdim, one_hot)

    def argmax(self, dim: int | None = None, keepdim: bool = False, one_hot: bool = True) -> "ComparedTensor":
        """Return where the maximum is, the first of equal ones; arguments and cost as `max`."""
        own = self._additive()
        if dim is not None:
            best = _largest(own.share.movedim(dim, 0)).unsqueeze(dim)
            return self._places(own._first(best, dim), dim, keepdim, one_hot)
        flat = own._with(own.share.flatten())
        place = self._places(flat._first(_largest(flat.share), 0), 0, False, one_hot)
        return place._with(place.share.reshape(own.share.shape)) if one_hot else place

    def _first(self, best: Tensor, dim: int) -> Tensor:
        """Return the bit [self is `best`, and nothing before it along `dim`]: 5 rounds."""
        party = door.current()
        first = int(party.rank == 0)
        is_best = first - _negative(self.share - best)
        alone = first - _negative(first - is_best.cumsum(dim))
        return beaver.mul(party, is_best, alone)

    def _places(self, first: Tensor, dim: int, keepdim: bool, one_hot: bool) -> "ComparedTensor":
        if one_hot:
            return self.from_shares(first, precision=0)
        index = torch.arange(first.shape[dim]).reshape(
            [-1 if i == dim % first.dim() else 1 for i in range(first.dim())]
        )
        return self.from_shares((first * index).sum(dim, keepdim=keepdim), precision=0)

    def max_pool2d(
        self,
        kernel_size: Any,
        padding: Any = 0,
        stride: Any = None,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        """Return the maxima over windows: 2 ceil(log2 kernel) rounds. Arguments as torch has them.

        With dilation, ceil_mode or return_indices it is CrypTen's, which asks for `max`.
        """
        own = self._additive()
        if return_indices or ceil_mode or _pair(dilation) != (1, 1) or own.share.dim() != 4:
            return super().max_pool2d(kernel_size, padding, stride, dilation, ceil_mode, return_indices)
        party = door.current()
        lowest = -(1 << (party.comparison_bits - 2)) if party.rank == 0 else 0
        top, left = _pair(padding)
        padded = ring.pad2d(own.share, (top, left, top, left), lowest)
        kernel = _pair(kernel_size)
        return own._with(_largest(ring.windows(padded, kernel, kernel if stride is None else _pair(stride))))

    # --- products ---

    def mul(self, y: Any) -> Any:
        """Return self * y: no round for a whole number (CrypTen's linear layers multiply by 1.0), else as CrypTen."""
        return super().mul(int(y) if isinstance(y, float) and y.is_integer() else y)

    def matmul(self, y: Any) -> Any:
        """Return self @ y: 2 rounds with a shared matrix y, 1 with a public one; other shapes as CrypTen has them."""
        if not _is_tensor(y, 2) or self.ptype != ARITHMETIC or self.share.dim() < 1:
            return super().matmul(y)
        return self._product(reused_masks.MATMUL, y)

    def conv2d(self, kernel: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
        """Return the convolution with a kernel: 2 rounds with a shared one, 1 with a public one."""
        how = _pair(stride), _pair(padding), _pair(dilation)
        if not _is_tensor(kernel, 4) or self.ptype != ARITHMETIC or self.share.dim() != 4:
            return super().conv2d(kernel, stride=how[0], padding=how[1], dilation=how[2], groups=groups)
        return self._product(reused_masks.conv2d(*how, groups), kernel)

    def _product(self, options: reused_masks.Options, y: Any) -> "ComparedTensor":
        party, scale = door.current(), self.encoder.scale
        if isinstance(y, MPCTensor):
            share = _weights(party).multiply(party, options, self.share, y.share)
            result = self if scale > 1 else y
            cut = scale > 1 and y.encoder.scale > 1
        else:
            share = _public_product(options, self.share, self.encoder.encode(y))
            result, cut = self, scale > 1
        return result._with(truncate(party, share, int(scale).bit_length() - 1) if cut else share)


def _is_tensor(y: Any, dim: int) -> bool:
    """Return whether y is a public tensor, or a shared one of the arithmetic kind, of so many axes."""
    if isinstance(y, MPCTensor):
        return bool(isinstance(y, ComparedTensor) and y.ptype == ARITHMETIC and y.share.dim() == dim)
    return isinstance(y, Tensor) and y.dim() == dim


def _public_product(options: reused_masks.Options, x: Tensor, w: Tensor) -> Tensor:
    how = dict(options)
    if how.pop("op") == "matmul":
        return kernels.prepare_matmul(w.contiguous()).apply(x)
    return kernels.prepare_conv2d(w.contiguous(), size=(x.shape[2], x.shape[3]), **how).apply(x)


@dataclass
class EagerParty(Party):
    """A party whose program calls CrypTen itself.

    Args:
        weights: the shared operands that it has multiplied with.
    """

    weights: Weights = field(kw_only=True)


def _weights(party: Party) -> Weights:
    if not isinstance(party, EagerParty):
        raise UnsupportedError("tensors of type 'securemtk' may be used by an EagerParty only")
    return party.weights


crypten.register_cryptensor("securemtk")(ComparedTensor)


@contextlib.contextmanager
def using(party: EagerParty, protocol: str) -> Iterator[None]:
    """Let CrypTen's operations in this thread be those of `party`, and new cryptensors ours.

    Args:
        party: this party.
        protocol: "fss" for our protocols; "crypten" for CrypTen's own, over the same dealer and links.

    Raises:
        UnsupportedError: an unknown protocol.
    """
    if protocol not in TYPES:
        raise UnsupportedError(f"protocol must be one of {', '.join(TYPES)}; got {protocol!r}")
    default, uninit = crypten.get_default_cryptensor_type(), crypten.communicator.uninit
    crypten.set_default_cryptensor_type(TYPES[protocol])
    # A program that was written for CrypTen's own launcher may end what we began.
    crypten.communicator.uninit = lambda: None
    try:
        with warnings.catch_warnings(), door.acting(party):
            warnings.filterwarnings("ignore", "CrypTen is already initialized", RuntimeWarning)
            # Of CrypTen's converter; encryption makes copies of what it read.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            yield
    finally:
        crypten.set_default_cryptensor_type(default)
        crypten.communicator.uninit = uninit
