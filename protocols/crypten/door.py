"""The only door to CrypTen: its import on current torch, and what of it is replaced.

CrypTen 0.4.1 imports a module that torch has moved, draws its masks from Mersenne Twisters with
32 effective bits of seed, lets party 0 make every triple, truncates with a small chance of a jump
by 2**48, and prints shares. Importing this module mends all of that for the whole process:

- `crypten.communicator.get` gives the communicator of the party that acts in this thread;
- CrypTen's generators are the AES streams of that party, and its drawing functions take no others;
- the default tuple provider takes every triple from that party's correlations, made by the dealer;
- division by a public integer is `party.truncate`, which errs by one unit in the last place at most;
- CrypTen's settings are kept by thread;
- `repr` of CrypTen's tensors shows no share;
- `crypten.nn.from_pytorch` exports with the arguments that current torch knows.
"""

import contextlib
import copy
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.onnx._internal.torchscript_exporter.registration as _registration
from torch import Tensor

from protocols import limits
from protocols.dealing.correlation import Request
from protocols.errors import DealerError, ProtocolAbort, UnsupportedError
from protocols.primitives.prg import Stream
from protocols.two_party.party import Party, truncate

# CrypTen looks where torch had it before 2.9.
sys.modules.setdefault("torch.onnx._internal.registration", _registration)
if "crypten" not in sys.modules:
    # Whoever tried to import it before has parts of it left, which no later import would put in their places.
    for _name in [name for name in sys.modules if name.startswith("crypten.")]:
        del sys.modules[_name]

import crypten as crypten  # noqa: E402
import crypten.communicator  # noqa: E402
import crypten.mpc  # noqa: E402
from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor  # noqa: E402
from crypten.mpc.provider.provider import TupleProvider  # noqa: E402

# 1 / y for a public integer y is multiplied with this many fraction bits before the truncation.
_RECIPROCAL_BITS = 20

_acting = threading.local()


def current() -> Party:
    """Return the party that acts in this thread."""
    party: Party | None = getattr(_acting, "party", None)
    if party is None:
        raise ProtocolAbort("no party acts in this thread: CrypTen may be used inside `acting(party)` only")
    return party


@contextlib.contextmanager
def acting(party: Party) -> Iterator[None]:
    """Let CrypTen's operations in this thread be those of `party`."""
    before = getattr(_acting, "party", None)
    _acting.party = party
    try:
        yield
    finally:
        _acting.party = before


# --- communicator ---------------------------------------------------------------------------------------------------


class PartyCommunicator(crypten.communicator.Communicator):  # type: ignore[misc]
    """CrypTen's view of the wire between two parties. Objects do not travel, tensors do.

    An opening is one simultaneous exchange (CrypTen's own all-reduce takes two hops).
    """

    BYTES_PER_ELEMENT = 8

    @classmethod
    def is_initialized(cls) -> bool:
        """Return whether a party acts in this thread."""
        return getattr(_acting, "party", None) is not None

    @classmethod
    def get(cls) -> "PartyCommunicator":
        """Return the communicator of this thread's party."""
        current()
        return cls()

    @classmethod
    def initialize(cls, *_: Any, **__: Any) -> None:
        """Refuse: parties are made by securemtk, not by crypten.init()."""
        raise UnsupportedError("parties are made by securemtk.Session, not by crypten.init()")

    @classmethod
    def shutdown(cls) -> None:
        """Refuse, as `initialize` does."""
        raise UnsupportedError("a party ends with its session, not by crypten.uninit()")

    def get_world_size(self) -> int:
        """Return 2."""
        return 2

    def get_rank(self) -> int:
        """Return 0 at the keeper, 1 at the user."""
        return current().rank

    def all_reduce(self, tensors: Any, op: Any = torch.distributed.ReduceOp.SUM, batched: bool = False) -> Any:
        """Return the sum (or xor) of both parties' tensors; a list travels as one message."""
        wire = current().wire
        if not batched:
            return _combine(tensors, wire.exchange("open", tensors), op)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        total = _combine(flat, wire.exchange("open", flat), op)
        parts = torch.split(total, [t.numel() for t in tensors])
        return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def reduce(self, tensors: Any, dst: int, op: Any = torch.distributed.ReduceOp.SUM, batched: bool = False) -> Any:
        """Return the combination at `dst`, the own tensor elsewhere."""
        party = current()
        many = list(tensors) if batched else [tensors]
        flat = torch.cat([t.reshape(-1) for t in many])
        if party.rank != dst:
            party.wire.send("open", flat)
            return tensors
        total = _combine(flat, party.wire.recv("open", flat.shape), op)
        parts = [p.reshape(t.shape) for p, t in zip(torch.split(total, [t.numel() for t in many]), many, strict=True)]
        return parts if batched else parts[0]

    def all_gather(self, tensor: Tensor, async_op: bool = False) -> list[Tensor]:
        """Return both parties' tensors by rank."""
        other = current().wire.exchange("gather", tensor)
        return [tensor, other] if current().rank == 0 else [other, tensor]

    def gather(self, tensor: Tensor, dst: int, async_op: bool = False) -> list[Tensor] | None:
        """Return both parties' tensors at `dst`."""
        party = current()
        if party.rank != dst:
            party.wire.send("gather", tensor)
            return None
        other = party.wire.recv("gather", tensor.shape)
        return [tensor, other] if dst == 0 else [other, tensor]

    def broadcast(self, tensors: Any, src: int, async_op: bool = False, batched: bool = False) -> Any:
        """Return the tensor of `src` at both parties."""
        party = current()
        many = list(tensors) if batched else [tensors]
        flat = torch.cat([t.reshape(-1) for t in many])
        if party.rank == src:
            party.wire.send("broadcast", flat)
            return tensors
        got = party.wire.recv("broadcast", flat.shape)
        parts = [p.reshape(t.shape) for p, t in zip(torch.split(got, [t.numel() for t in many]), many, strict=True)]
        return parts if batched else parts[0]

    def scatter(self, scatter_list: Any, src: int, size: Any = None, async_op: bool = False) -> Tensor:
        """Return this party's tensor of a list that `src` holds."""
        party = current()
        if party.rank == src:
            party.wire.send("scatter", scatter_list[1 - src])
            mine: Tensor = scatter_list[src]
            return mine
        return party.wire.recv("scatter", size if size is not None else scatter_list[party.rank].shape)

    def barrier(self) -> None:
        """Wait for the other party."""
        current().wire.exchange("barrier", torch.zeros(1, dtype=torch.int64))

    def send_obj(self, *_: Any, **__: Any) -> None:
        """Refuse: CrypTen would pickle."""
        raise UnsupportedError("objects do not travel between parties: CrypTen would pickle them")

    recv_obj = broadcast_obj = send_obj


def _combine(x: Tensor, y: Tensor, op: Any) -> Tensor:
    if op == torch.distributed.ReduceOp.SUM:
        return x + y
    if op == torch.distributed.ReduceOp.BXOR:
        return x ^ y
    raise UnsupportedError(f"a reduction must be a sum or xor; got {op}")


# --- provider -------------------------------------------------------------------------------------------------------


class DealerProvider(TupleProvider):  # type: ignore[misc]
    """CrypTen's tuple provider interface over the dealer's correlations."""

    NAME = "dealer"

    def generate_additive_triple(
        self, size0: Sequence[int], size1: Sequence[int], op: str, device: Any = None, *_: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """Return [a], [b], [op(a, b)]."""
        options = (("op", op), *sorted((k, _hashable(v)) for k, v in kwargs.items()))
        parts = current().correlations.take(Request("triple", (tuple(size0), tuple(size1)), options))
        a, b, c = (ArithmeticSharedTensor.from_shares(part, precision=0) for part in parts)
        return a, b, c

    def square(self, size: Sequence[int], device: Any = None) -> tuple[Any, Any]:
        """Return [r], [r * r]."""
        r, r2 = current().correlations.take(Request("square", (tuple(size),)))
        return (ArithmeticSharedTensor.from_shares(r, precision=0), ArithmeticSharedTensor.from_shares(r2, precision=0))

    def generate_binary_triple(
        self, size0: Sequence[int], size1: Sequence[int], device: Any = None
    ) -> tuple[Any, Any, Any]:
        """Return xor-sharings of a, b, a & b."""
        parts = current().correlations.take(Request("and", (tuple(size0), tuple(size1))))
        a, b, c = (BinarySharedTensor.from_shares(part, precision=0) for part in parts)
        return a, b, c

    def wrap_rng(self, size: Sequence[int], device: Any = None) -> tuple[Any, Any]:
        """Refuse: only CrypTen's truncation among three or more parties asks for it, and ours needs none."""
        raise DealerError("the dealer makes no wrap correlations: truncation among two parties needs none")

    def B2A_rng(self, size: Sequence[int], device: Any = None) -> tuple[Any, Any]:  # noqa: N802
        """Return a random bit as arithmetic and as xor-sharing."""
        b, a = current().correlations.take(Request("bit", (tuple(size),)))
        return (ArithmeticSharedTensor.from_shares(a, precision=0), BinarySharedTensor.from_shares(b, precision=0))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


# --- randomness -----------------------------------------------------------------------------------------------------


class _Generators(dict[str, Any]):
    """Stands in for `crypten.generators`: name -> device -> this thread's party's stream."""

    def __missing__(self, name: str) -> "_ByDevice":
        if name not in ("prev", "next", "local"):
            raise UnsupportedError(f"CrypTen's generator {name!r} has no secure counterpart here")
        return _ByDevice(name)


class _ByDevice:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, device: Any) -> Stream:
        party = current()
        return {"prev": party.previous, "next": party.following, "local": party.local}[self._name]


def _stream(generator: Any) -> Stream:
    if generator is None:
        return current().local
    if not isinstance(generator, Stream):
        raise UnsupportedError(f"a mask must come from an AES stream; got a {type(generator).__name__}")
    return generator


def _ring_element(size: Sequence[int], ring_size: int = 2**64, generator: Any = None, **kwargs: Any) -> Tensor:
    if ring_size != 2**64:
        raise UnsupportedError("ring elements must be of 64 bits")
    stream = _stream(generator)
    if torch.device(kwargs.get("device") or "cpu").type == "meta":
        return torch.empty(tuple(size), dtype=torch.int64, device="meta")
    return stream.words(size)


def _kbit_tensor(size: Sequence[int], bitlength: int | None = None, generator: Any = None, **kwargs: Any) -> Tensor:
    words = _ring_element(size, generator=generator, **kwargs)
    return words if bitlength in (None, 64) else words & ((1 << int(bitlength)) - 1)


# --- configuration --------------------------------------------------------------------------------------------------


class _ThreadConfig(type(crypten.cfg)):  # type: ignore[misc]
    """CrypTen's configuration, one for each thread.

    CrypTen overrides settings for the time of a call (`temp_override`) in one global object, so that
    two sessions in two threads would silently compute with each other's settings.
    """

    _template = crypten.cfg.config
    _own = threading.local()

    @property
    def config(self) -> Any:
        """This thread's settings."""
        if not hasattr(self._own, "config"):
            with _CONFIG_LOCK:
                self._own.config = copy.deepcopy(self._template)
        return self._own.config

    @config.setter
    def config(self, value: Any) -> None:
        self._own.config = value


_CONFIG_LOCK = threading.Lock()


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _div_(self: Any, y: Any) -> Any:
    """Stands in for ArithmeticSharedTensor.div_: public divisors by `truncate`, never share by share."""
    if isinstance(y, float) and y.is_integer():
        y = int(y)
    if isinstance(y, int):
        if y <= 0:
            raise UnsupportedError(f"a public divisor must be positive; got {y}")
        if y & (y - 1) == 0:
            self.share = truncate(current(), self.share, y.bit_length() - 1) if y > 1 else self.share
        else:
            self.share = truncate(current(), self.share * round(2**_RECIPROCAL_BITS / y), _RECIPROCAL_BITS)
        return self
    return self.mul_(torch.as_tensor(y, dtype=torch.float).reciprocal())


def _hidden(self: Any) -> str:
    return f"{type(self).__name__}(<share hidden>, shape={tuple(self.share.shape)})"


def _export_pytorch_model(file: Any, model: Any, dummy_input: Any) -> Any:
    """Stands in for the converter's: current torch has dropped `operator_export_type`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the old one; CrypTen's converter rests on it
        torch.onnx.export(
            model,
            dummy_input,
            file,
            dynamo=False,
            do_constant_folding=False,
            export_params=True,
            input_names=["input"],
            output_names=["output"],
            opset_version=crypten.nn.onnx_converter._OPSET_VERSION,
        )
    return file


def _install() -> None:
    originals = {
        crypten.common.rng.generate_random_ring_element: _ring_element,
        crypten.common.rng.generate_kbit_random_tensor: _kbit_tensor,
    }
    for name, module in list(sys.modules.items()):
        if name == "crypten" or name.startswith("crypten."):
            for attribute, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in originals:
                    setattr(module, attribute, originals[value])
    crypten.generators = _Generators()
    del crypten.cfg.__dict__["config"]
    crypten.cfg.__class__ = _ThreadConfig
    crypten.communicator.get = PartyCommunicator.get
    crypten.communicator.is_initialized = PartyCommunicator.is_initialized
    provider = DealerProvider()
    crypten.mpc.get_default_provider = lambda: provider
    ArithmeticSharedTensor.div_ = ArithmeticSharedTensor.__itruediv__ = _div_
    crypten.nn.onnx_converter._export_pytorch_model = _export_pytorch_model
    for kind in (ArithmeticSharedTensor, BinarySharedTensor, crypten.mpc.MPCTensor):
        kind.__repr__ = _hidden


_install()


# --- tensors --------------------------------------------------------------------------------------------------------


def arithmetic(share: Tensor, frac_bits: int = limits.FRAC_BITS) -> Any:
    """Return a share as CrypTen's arithmetic shared tensor at scale 2**frac_bits."""
    return ArithmeticSharedTensor.from_shares(share, precision=frac_bits)


def mpc_tensor(share: Tensor, frac_bits: int = limits.FRAC_BITS) -> Any:
    """Return a share as CrypTen's MPCTensor at scale 2**frac_bits."""
    return crypten.mpc.MPCTensor.from_shares(share, precision=frac_bits)


def beaver(op: str, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Return a share of op(x, y) mod 2**64 by CrypTen's Beaver protocol, without rescaling.

    Cost: 1 round; 16 (|x| + |y|) bytes.
    Security: both openings are under masks that serve once.
    Source: Beaver, CRYPTO 1991 [Bea91]; docs/protocols.md#products.
    """
    product: Tensor = getattr(crypten.mpc.primitives.beaver, op)(arithmetic(x, 0), arithmetic(y, 0), **options).share
    return product
