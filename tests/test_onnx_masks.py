"""Masks as exporters write them, and questions for NaN: right for all rows, within comparisons' range, or refused."""

import math
import warnings
from collections.abc import Callable
from io import BytesIO

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import build, torchscript
from program_oracle import run
from test_protocols import secure
from torch import Tensor, nn

from protocols.errors import UnsupportedError
from protocols.ranges import measure
from securemtk.onnx.importer import Imported, load_onnx
from securemtk.onnx.proofs import Proofs
from securemtk.onnx.runtime import start

OP = helper.make_node
HEADS, LONG = 2, 6
FP16, FP32 = torch.finfo(torch.float16).min, torch.finfo(torch.float32).min


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


def right(data: bytes, feeds: dict, atol: float = 4e-4) -> Imported:
    """Import a file and assert that the program is in range and says what onnxruntime says."""
    imported = load_onnx(data)
    numbers = {name: value.astype(np.float64) for name, value in feeds.items()}
    ranges = measure(imported.program, imported.params, [numbers])
    assert all(row.share < 1 for row in ranges), ranges
    got = run(imported.program, imported.params, numbers)
    for info, want in zip(imported.outputs, start(data).run(None, feeds), strict=True):
        np.testing.assert_allclose(got[info.name], want, atol=atol)
    return imported


def mask(dtype: type = np.float32) -> np.ndarray:
    """Rows of truth values: some out, the second row out as a whole."""
    return np.array([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).astype(dtype)


def scores(scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(1).standard_normal((3, HEADS, LONG, LONG))).astype(np.float32)


def wide(m: Tensor) -> Tensor:
    return m[:, None, None, :]


FORMS: dict[str, Callable[..., Tensor]] = {
    "(1 - m) C": lambda s, m, c: s + (1.0 - wide(m)) * c,
    "C (1 - m) before scores": lambda s, m, c: (1.0 - wide(m)) * c + s,
    "(m - 1) * -C": lambda s, m, c: s + (wide(m) - 1.0) * -c,
    "less (1 - m) * -C": lambda s, m, c: s - (1.0 - wide(m)) * -c,
    "m * -C + C": lambda s, m, c: s + (wide(m) * -c + c),
    "scaled afterwards": lambda s, m, c: (s + (1.0 - wide(m)) * c) / 8.0,
    "expanded": lambda s, m, c: s + ((1.0 - wide(m)) * c).expand(-1, HEADS, LONG, LONG),
    "a product of two": lambda s, m, c: s + (1.0 - m[:, None, :, None] * wide(m)) * c,
    "of a comparison": lambda s, m, c: s + (wide(m) < 0.5).float() * c,
    "masked_fill": lambda s, m, c: s.masked_fill(wide(m) == 0, c),
    "where": lambda s, m, c: torch.where(wide(m) > 0.5, s, torch.tensor(c)),
    "where, then added": lambda s, m, c: s + torch.where(wide(m) > 0.5, 0.0, c),
    "masked_fill of 1 - m": lambda s, m, c: s + (1.0 - wide(m)).masked_fill((1.0 - wide(m)).bool(), c),
}
NUMBERS = [-10000.0, FP16, -1e6, -1e9, FP32]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_mask_is_right_in_every_form_and_row(exporter, form, number):
    example = (torch.from_numpy(scores()), torch.from_numpy(mask()))
    data = EXPORTERS[exporter](lambda s, m: torch.softmax(FORMS[form](s, m, number), -1), example)
    # Between these float32 has part of a score left where all of a row is out: no right value for fixed point.
    rows = slice(None) if abs(number) < 1e5 or abs(number) >= 1e9 else [0, 2]
    given = {"x": scores()[rows], "m": mask()[rows]}
    names = [x.name for x in load_onnx(data).inputs]
    # -65504 and -10000 leave float32 itself with 1/256 and 1/1024 of a score.
    right(data, dict(zip(names, given.values(), strict=True)), atol=4e-3 if number == FP16 else 7e-4)
