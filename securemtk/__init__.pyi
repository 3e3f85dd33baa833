"""The types of what securemtk offers, for type checkers: `__init__.py` imports each name when it is asked for."""

from protocols.errors import (
    BundleError,
    DealerError,
    InputError,
    IntegrityError,
    KeyRefused,
    NeedsInputs,
    PeerLost,
    PeerRefused,
    PeerTimeout,
    ProtocolAbort,
    RangeError,
    RangeWarning,
    SecureError,
    ShapeError,
    StoreError,
    TransportError,
    UnmeasuredWarning,
    UnsupportedError,
    WrongProcess,
)
from securemtk.serving.config import Config
from securemtk.serving.onnxruntime_api import InferenceSession, NodeArg
from securemtk.serving.session import Model, PredictionCost, Session
from securemtk.tasks import Task

__all__ = [
    "BundleError",
    "Config",
    "DealerError",
    "InferenceSession",
    "InputError",
    "IntegrityError",
    "KeyRefused",
    "Model",
    "NeedsInputs",
    "NodeArg",
    "PeerLost",
    "PeerRefused",
    "PeerTimeout",
    "PredictionCost",
    "ProtocolAbort",
    "RangeError",
    "RangeWarning",
    "SecureError",
    "Session",
    "ShapeError",
    "StoreError",
    "Task",
    "TransportError",
    "UnmeasuredWarning",
    "UnsupportedError",
    "WrongProcess",
]
