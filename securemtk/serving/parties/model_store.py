"""Which models a keeper may serve: an interface, and the models of one machine behind it."""

from collections.abc import Sequence
from typing import Protocol

from protocols.on_demand import Late
from securemtk.onnx.manifest import Manifest

# Large, and not needed before there is a model to read.
bundle = Late("securemtk.onnx.bundle")

# A manifest, None for a plain ONNX file, and the bytes of the model.
StoredModel = tuple[Manifest | None, bytes]


class ModelStore(Protocol):
    """The models that a keeper may serve, by name."""

    def names(self) -> Sequence[str]:
        """Return the names that it tells users of."""

    def get(self, name: str) -> StoredModel:
        """Return a model.

        Raises:
            InputError: there is none of this name, or it is damaged: a `BundleError`.
            UnsupportedError: it cannot be run under encryption.
        """

    def accept(self, data: bytes) -> StoredModel:
        """Return what a user's own ONNX file is served as; raise InputError where users must not bring any."""


class LocalModels:
    """Every bundle and ONNX file that this process can read, by its path, and the files of users.

    For a user who runs the keeper as well.
    """

    def names(self) -> Sequence[str]:
        """Return none: it keeps no list."""
        return ()

    def get(self, name: str) -> StoredModel:
        """Read a bundle's folder or an ONNX file; see `securemtk.onnx.bundle.read_model`."""
        found: StoredModel = bundle.read_model(name)
        return found

    def accept(self, data: bytes) -> StoredModel:
        """Return the file as it is."""
        return None, data
