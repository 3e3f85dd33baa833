"""Every error of the project, by what the caller can do about it.

A message states *what* must be *which rule* and what came instead. It never holds
a share, a mask, a key or any other secret value.
"""

import traceback
from collections.abc import Sequence
from pathlib import Path


class SecureError(Exception):
    """The root: whatever the project raises on purpose."""


class InputError(SecureError, ValueError):
    """The caller can mend it: nothing was sent, the session lives on."""


class ShapeError(InputError):
    """An array has not the shape or dtype that was asked for."""


class RangeError(InputError):
    """A value lies outside what fixed point holds, or is not finite."""


class RangeWarning(UserWarning):
    """On sample data a model's values come near what fixed point holds."""


class UnmeasuredWarning(RangeWarning):
    """Nobody has told of a model what its values are on any data: an answer may be wrong without a sign."""


class BundleError(InputError):
    """A bundle or ONNX file is missing, damaged or edited."""


class WrongProcess(InputError):
    """What only its maker may use is used in a fork of that process: make it anew there."""


class KeyRefused(InputError):
    """A trigger-key is absent, of another model, or locked by another passphrase."""


class UnsupportedError(SecureError):
    """The model asks for operations that we do not have; the message lists all of them."""


class NeedsInputs(UnsupportedError, ShapeError):
    """A model can be understood only when whole shapes of its inputs, or some of their values, are known.

    Args:
        message: what stands in the way without them.
        shapes: whether the whole shape of each input is needed.
        public: names of inputs whose values are needed in the clear.
        nodes: what stands in the way without them, as in `securemtk.onnx.model.problems.UnsupportedNodes`.
    """

    def __init__(
        self, message: str, shapes: bool = False, public: Sequence[str] = (), nodes: Sequence[object] = ()
    ) -> None:
        super().__init__(message)
        self.shapes, self.public, self.nodes = shapes, tuple(public), list(nodes)


class ProtocolAbort(SecureError):
    """Nobody may use a result; the session is dead."""


class DealerError(ProtocolAbort):
    """A correlation is absent, used up, or not the one that the protocol asked for."""


class StoreError(ProtocolAbort):
    """Correlations on disk cannot be written, or are not there as they were written."""


class IntegrityError(ProtocolAbort):
    """A peer sent a message that does not fit the protocol."""


class TransportError(ProtocolAbort):
    """The connection to a peer failed."""


class PeerTimeout(TransportError):
    """A peer is connected, but silent for longer than allowed."""


class PeerLost(TransportError):
    """A peer's process or connection is gone."""


class PeerRefused(TransportError):
    """A peer could not prove its role, or refused ours."""


def place_of(error: BaseException, path: str | Path | None = None) -> str:
    """Return an unforeseen error's kind and its line in `path`, a file or folder, or else where it was raised.

    That alone may travel: its text could hold a value.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and Path(frame.filename).is_relative_to(path)]
    frame = (own or frames)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
