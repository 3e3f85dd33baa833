"""A released model: a folder with `manifest.json` and `cloud.onnx`, complete or absent.

The manifest says which files belong to the bundle, with size and SHA-256, and ends in a SHA-256 of itself. That finds
damage and careless edits; whoever can write the folder can also write the sums, so it is no signature. Trigger-keys are
never part of a bundle.
"""

import hashlib
import importlib.metadata
import os
import platform
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocols.errors import BundleError, InputError, RangeError, RangeWarning
from protocols.program.program import Shape
from protocols.running import ranges
from protocols.running.ranges import Headroom
from securemtk.onnx.examine import examine
from securemtk.onnx.export import writing
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.manifest import MANIFEST, MODEL, Manifest
from securemtk.onnx.model.inputs import input_arrays
from securemtk.onnx.model.reading import MAX_BYTES, read_proto, self_contained
from securemtk.support.files import read_regular, replaced_folder, write_whole
from securemtk.tasks import Task

_MAX_MANIFEST_BYTES = 1 << 26
_LIBRARIES = ("securemtk", "torch", "onnx", "onnxruntime", "numpy")


def write_bundle(
    folder: str | os.PathLike[str],
    onnx_bytes: bytes,
    *,
    model_id: str,
    tasks: Sequence[Task],
    input_name: str,
    input_shape: Shape,
    low: float,
    high: float,
    answers: Mapping[str, Mapping[str, Any]] | None = None,
    decoupling: Mapping[str, Any] | None = None,
    frac_bits: int = 16,
    samples: Iterable[NDArray[np.float32]] = (),
    overwrite: bool = False,
) -> Manifest:
    """Write a bundle whole or not at all.

    Args:
        folder: the bundle's folder; its parent must exist.
        onnx_bytes: the model, with one output for each task, named like it.
        model_id, tasks, input_name, input_shape, low, high, decoupling, frac_bits: as in `Manifest`.
        answers: as in `Manifest`; arrays are allowed.
        samples: batches of what the model will be asked, (n, *input_shape) each, for the manifest's headroom.
        overwrite: replace a bundle that is there. Anything else that is there is never replaced.

    Returns:
        The manifest that was written.

    Raises:
        BundleError: a field breaks its rule, the model does not fit the tasks, the folder exists, or the disk refuses.
        UnsupportedNodes: the model cannot be run under encryption.
        RangeError: a parameter, or on the samples a value, is outside fixed point.

    Warns:
        RangeWarning: on the samples, values reach half of what fixed point holds.
    """
    target = check_bundle_target(folder, overwrite=overwrite)
    manifest = Manifest(
        model_id=model_id,
        tasks=tuple(tasks),
        input_name=input_name,
        input_shape=tuple(int(n) for n in input_shape),
        low=float(low),
        high=float(high),
        answers={
            task: {kind: np.asarray(matrix, dtype=np.float64).tolist() for kind, matrix in kinds.items()}
            for task, kinds in (answers or {}).items()
        },
        files={MODEL: {"sha256": hashlib.sha256(onnx_bytes).hexdigest(), "bytes": len(onnx_bytes)}},
        versions={name: _version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        frac_bits=frac_bits,
        decoupling=decoupling,
    )
    imported = _check_model(manifest, onnx_bytes)
    manifest = replace(manifest, headroom=_measured(manifest, imported, onnx_bytes, samples))
    # Weights are the keeper's secret: nobody else may enter.
    with writing(folder), replaced_folder(target, private=True) as fresh:
        write_whole(fresh / MODEL, onnx_bytes)
        write_whole(fresh / MANIFEST, manifest.to_json().encode())
        check_bundle_target(folder, overwrite=overwrite)
    return manifest


def check_bundle_target(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return the absolute path of a folder that `write_bundle` may make, or replace; for use before the work.

    Args:
        folder: of the bundle.
        overwrite: whether a bundle that is there may be replaced.

    Raises:
        BundleError: something is there that may not be replaced, or its parent takes no new folder.
    """
    target = Path(os.path.abspath(folder))
    if os.path.lexists(target) and not overwrite:
        raise BundleError(f"{os.fspath(folder)!r} must not exist yet; say overwrite to replace a bundle")
    if os.path.lexists(target) and not _looks_like_bundle(target):
        raise BundleError(f"{os.fspath(folder)!r} must be a bundle to be replaced; it holds something else")
    with writing(folder), tempfile.TemporaryFile(dir=target.parent):
        return target


def read_bundle(folder: str | os.PathLike[str]) -> tuple[Manifest, bytes]:
    """Read and verify a bundle.

    Args:
        folder: the bundle's folder.

    Returns:
        The manifest and the bytes of `cloud.onnx`.

    Raises:
        BundleError: a file is missing, extra, edited or no regular file, or the model does not fit the manifest; the
            message names the file.
        UnsupportedNodes: the model cannot be run under encryption.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"bundle {os.fspath(folder)!r} cannot be opened: {error.strerror}") from None
    try:
        present = set(os.listdir(handle))
        if extra := sorted(present - {MANIFEST, MODEL}):
            raise BundleError(f"a bundle must hold {MANIFEST} and {MODEL} only; it also holds {extra[0]!r}")
        if missing := sorted({MANIFEST, MODEL} - present):
            raise BundleError(f"a bundle must hold {MANIFEST} and {MODEL}; {missing[0]!r} is missing")
        manifest = Manifest.from_json(_text(_member(handle, MANIFEST, _MAX_MANIFEST_BYTES)))
        data = _member(handle, MODEL, MAX_BYTES)
    finally:
        os.close(handle)
    facts = manifest.files[MODEL]
    if len(data) != facts["bytes"]:
        raise BundleError(f"{MODEL} must have {facts['bytes']} bytes; got {len(data)}")
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise BundleError(f"{MODEL} must be unchanged; its SHA-256 is another")
    _check_model(manifest, data)
    return manifest, data


def read_model(path: str | os.PathLike[str]) -> tuple[Manifest | None, bytes]:
    """Read a bundle's folder or a plain ONNX file, external data included.

    Returns:
        The manifest, None for a plain file, and the bytes of the model.

    Raises:
        BundleError: as `read_bundle`, or the file cannot be read.
    """
    return read_bundle(path) if os.path.isdir(path) else (None, self_contained(os.fspath(path)))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _measured(
    manifest: Manifest, imported: Imported, data: bytes, samples: Iterable[NDArray[np.float32]]
) -> Headroom | None:
    """Return the headroom on samples, None without any; refuse a model that leaves the range, or errs, on them."""
    first: list[NDArray[np.floating]] = []

    def batches() -> Iterator[Mapping[str, NDArray[np.floating]]]:
        for x in samples:
            arrays = input_arrays(imported.program.inputs, x, manifest.low, manifest.high)
            if len(first) < _EXAMINED_BATCHES:
                first.append(arrays[manifest.input_name][:_EXAMINED])
            yield arrays

    room = ranges.headroom(ranges.measure(imported.program, imported.params, batches()))
    ranges.require(room)
    texts = [ranges.warning(room)]
    if first:
        # Answers of some samples of each kind tell as much as those of all; each takes a pass in integers.
        found = examine(read_proto(data), imported, {manifest.input_name: np.concatenate(first)})
        if wrong := found.wrong():
            raise RangeError("; ".join([wrong, *found.hints()]))
        texts += found.hints()
    for text in filter(None, texts):
        warnings.warn(text, RangeWarning, stacklevel=3)
    return room or None


# Samples of each batch, and batches, of which the answers are compared with onnxruntime's when a bundle is written.
_EXAMINED, _EXAMINED_BATCHES = 32, 8


def _check_model(manifest: Manifest, data: bytes) -> Imported:
    """Return the imported model; raise BundleError unless its input and outputs are those of the manifest."""
    imported = load_onnx(data)
    inputs = {x.name: x.shape for x in imported.inputs}
    if inputs != {manifest.input_name: manifest.input_shape}:
        want = f"{manifest.input_name!r} of shape {manifest.input_shape}"
        raise BundleError(f"{MODEL} must have one input {want}; got {inputs}")
    if imported.batch is not None:
        raise BundleError(f"{MODEL} must leave the batch free; it fixes {imported.batch}")
    outputs = [(x.name, x.shape) for x in imported.outputs]
    tasks = [(task.name, (task.classes,)) for task in manifest.tasks]
    if outputs != tasks:
        raise BundleError(f"{MODEL} must have one output for each task, {tasks}; got {outputs}")
    return imported


def _looks_like_bundle(target: Path) -> bool:
    if target.is_symlink() or not target.is_dir():
        return False
    return MANIFEST in (present := set(os.listdir(target))) and present <= {MANIFEST, MODEL}


def _member(handle: int, name: str, limit: int) -> bytes:
    """Return the bytes of a regular file in an open folder, following no link."""
    try:
        return read_regular(name, limit, name, folder=handle, follow=False)
    except OSError as error:
        raise BundleError(f"{name} must be a regular file, no link: {error.strerror}") from None
    except InputError as error:
        raise BundleError(str(error)) from None


def _text(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise BundleError(f"{MANIFEST} must be JSON text as written by this program") from None
