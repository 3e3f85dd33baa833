"""securemtk: ask a model about your data without showing the data.

Each public name is imported from where it lies when it is first asked for: the command line, roles and programs that
use a part of the toolkit load that part. What type each has stands in `__init__.pyi`.
"""

import protocols.errors
from protocols.on_demand import load

_PLACES = {
    "protocols.errors": (
        "BundleError",
        "DealerError",
        "InputError",
        "IntegrityError",
        "KeyRefused",
        "NeedsInputs",
        "PeerLost",
        "PeerRefused",
        "PeerTimeout",
        "ProtocolAbort",
        "RangeError",
        "RangeWarning",
        "SecureError",
        "ShapeError",
        "StoreError",
        "TransportError",
        "UnmeasuredWarning",
        "UnsupportedError",
        "WrongProcess",
    ),
    "securemtk.serving.config": ("Config",),
    "securemtk.serving.onnxruntime_api": ("InferenceSession", "NodeArg"),
    "securemtk.serving.session": ("Model", "PredictionCost", "Session"),
    "securemtk.tasks": ("Task",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = sorted(_PLACE_OF)

# As people import them, so that a traceback says what an `except` has to name.
for _name in _PLACES["protocols.errors"]:
    getattr(protocols.errors, _name).__module__ = __name__


def __getattr__(name: str) -> object:
    if name not in _PLACE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(load(_PLACE_OF[name]), name)
    globals()[name] = value  # so that this is asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
