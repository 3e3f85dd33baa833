"""Torch's two exporters to ONNX."""

import warnings
from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
from onnx_models import torchscript
from torch import Tensor, nn

from securemtk.onnx.importer import Imported


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


def dynamo(function: Callable[..., Tensor], example: tuple) -> bytes:
    """Export by torch's newer exporter."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Function(function).eval(), example, dynamo=True, verbose=False).save(buffer)
    return buffer.getvalue()


def legacy(function: Callable[..., Tensor], example: tuple) -> bytes:
    return torchscript(Function(function), example, 17, ["y"], free=True)


EXPORTERS = {"legacy": legacy, "dynamo": dynamo}


def fed(imported: Imported, feeds: dict) -> dict:
    """Inputs as a program takes them: as a whole they are one sample."""
    values = {name: value.astype(np.float32) for name, value in feeds.items()}
    return {name: value[None] for name, value in values.items()} if imported.program.whole else values
