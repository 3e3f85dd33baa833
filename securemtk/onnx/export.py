"""From a torch module to an ONNX file that says the same as the module."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import Message  # type: ignore[import-untyped]
from torch import Tensor, nn

from protocols.errors import BundleError, InputError, ShapeError, UnsupportedError
from securemtk.onnx.model.runtime import start
from securemtk.support.files import check_file, write_whole

OPSET = 18
TOLERANCE = 1e-4
_BATCHES = (1, 2, 5)


class _InOrder(nn.Module):
    """Returns a module's outputs as a tuple, in the order of their names."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: Any = self.module(*inputs)
        if isinstance(outputs, Mapping):
            return tuple(outputs[name] for name in self.names)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def export_onnx(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    output_names: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    input_names: Sequence[str] = ("input",),
) -> bytes:
    """Export a module in evaluation mode with a free batch, and check the file against it.

    Args:
        module: takes float32 tensors, batch first; returns a tensor, a tuple of them, or a dict by output name. Its
            mode and parameters are left as they are.
        example: inputs of the right shape and range, at least one sample; one tensor or a tuple of them.
        output_names: a name for each output, in the order of the file.
        path: where to write the file; not written when absent.
        input_names: a name for each input.

    Returns:
        The bytes of the ONNX file, opset `OPSET`, without paths, stack traces or other traces of this machine.

    Raises:
        ShapeError: `example`, the names and the module's outputs do not fit together.
        UnsupportedError: torch's exporter refuses the module.
        BundleError: onnxruntime's outputs differ from torch's by more than `TOLERANCE`, or the file cannot be written.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if len(inputs) != len(input_names) or not all(x.ndim and len(x) and x.dtype == torch.float32 for x in inputs):
        raise ShapeError(f"an example must be {len(input_names)} float32 tensors with at least one sample each")
    if path is not None:
        with writing(path):
            check_file(path)
    with _evaluating(module):
        wrapped = _InOrder(module, output_names).eval()
        _check_outputs(wrapped, inputs, output_names)
        model = _export(wrapped, inputs, input_names, output_names)
        _strip(model)
        data = bytes(model.SerializeToString(deterministic=True))
        _compare(wrapped, inputs, data, input_names)
    if path is not None:
        write_file(path, data)
    return data


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all, for its owner alone: weights are the keeper's secret.

    Raises:
        BundleError: it cannot be written, or as `securemtk.support.files.check_file`.
    """
    with writing(path):
        write_whole(path, data, private=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what stands in the way of a file or folder to write into a BundleError."""
    try:
        yield
    except InputError as error:
        raise BundleError(str(error)) from None
    except OSError as error:
        raise BundleError(f"{os.fspath(path)!r} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _check_outputs(wrapped: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str]) -> None:
    try:
        outputs = wrapped(*inputs)
    except KeyError as error:
        raise ShapeError(f"output_names must be among the module's outputs; {error} is not") from None
    if len(outputs) != len(names) or len(set(names)) != len(names):
        raise ShapeError(f"output_names must name each of {len(outputs)} outputs once; got {list(names)}")


def _export(
    wrapped: nn.Module, inputs: tuple[Tensor, ...], input_names: Sequence[str], output_names: Sequence[str]
) -> onnx.ModelProto:
    # torch.export takes an axis of size 1 for a constant: at least two samples keep the batch free.
    examples = tuple(torch.cat([x, x]) for x in inputs)
    batch = torch.export.Dim("batch")
    try:
        with _silence():
            program = torch.onnx.export(
                wrapped,
                examples,
                dynamo=True,
                dynamic_shapes={"inputs": tuple({0: batch} for _ in examples)},
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever its passes raise
        raise UnsupportedError(f"the module must be one that torch.onnx.export accepts; {_root(error)}") from error
    if program is None:
        raise UnsupportedError("the module must be one that torch.onnx.export accepts; it returned nothing")
    model: onnx.ModelProto = program.model_proto
    return model


def _root(error: BaseException) -> str:
    """Return the first line of the error behind all others; the exporter's own says only in which step it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress and warnings from the caller's streams."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _strip(message: Message) -> None:
    """Remove comments and metadata at any depth: the exporter writes stack traces with paths of this machine there."""
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for item in [value] if isinstance(value, Message) else value:
                _strip(item)


def _compare(wrapped: nn.Module, inputs: tuple[Tensor, ...], data: bytes, names: Sequence[str]) -> None:
    """Raise BundleError unless onnxruntime and torch agree on random input in the example's range."""
    session = start(data)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in _BATCHES:
        feeds = []
        for x in inputs:
            low, high = float(x.min()), float(x.max())
            noise = torch.rand((batch, *x.shape[1:]), generator=generator)
            feeds.append((low + (high - low) * noise).to(x.device))
        found = session.run(None, {name: x.cpu().numpy() for name, x in zip(names, feeds, strict=True)})
        for want, have in zip(wrapped(*feeds), found, strict=True):
            # NaN on either side must not pass as a small difference.
            worst = max(worst, float(np.nan_to_num(np.abs(want.cpu().numpy() - have), nan=np.inf).max(initial=0.0)))
    if worst > TOLERANCE:
        raise BundleError(f"the exported model must agree with torch within {TOLERANCE}; they differ by {worst:.3g}")
