"""Softmax and Gelu, the table of approximations, and what is said about them."""

import json

import numpy as np
import pytest
from onnx_models import one

from benchmarks import approximations, encrypted
from protocols.program.functions import FUNCTIONS
from securemtk.onnx.importer import load_onnx


@pytest.mark.parametrize(("classes", "rows"), [(10, 30), (1000, 2)])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_a_softmax_is_within_half_a_hundredth_encrypted(op, classes, rows):
    x = approximations.logits(classes, rows, seed=5)
    x[0] += 3000  # only differences matter
    imported = load_onnx(one(op, ["n", classes], axis=1).SerializeToString())
    found = encrypted.run(imported.program, imported.params, {"x": x.astype(np.float32)})["y"]
    exact = approximations.log_softmax(x)
    assert np.abs(found - (np.exp(exact) if op == "Softmax" else exact)).max() < 0.005


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_within_half_a_hundredth_encrypted_on_its_domain_and_beyond(approximate):
    x = np.concatenate([np.linspace(-6, 6, 600), [-16000, -300, 300, 16000]])
    imported = load_onnx(one("Gelu", ["n", len(x)], opset=20, approximate=approximate).SerializeToString())
    found = encrypted.run(imported.program, imported.params, {"x": x[None].astype(np.float32)})["y"]
    exact = FUNCTIONS["gelu_tanh" if approximate == "tanh" else "gelu"].exact(np.clip(x, -300, 300))
    exact[[-4, -1]] = 0, 16000
    assert np.abs(found - exact).max() < 0.005


def test_a_measurement_tells_errors_and_costs():
    (subject,) = approximations.subjects(["gelu_tanh"])
    row = approximations.measure(subject)
    assert row["within"]
    assert row["float_error"] <= 1.05e-4
    assert row["rounds"] == 3
    assert 30 < row["online_bytes"] < 60
    # A bound that is not kept is told.
    tight = approximations.measure(subject.__class__(**{**vars(subject), "allowed": subject.allowed / 1000}))
    assert not tight["within"]
    assert "(!)" in approximations.document([tight])


def test_the_document_is_that_of_the_results_and_has_every_function():
    rows = json.loads(approximations.RESULT.read_text())["functions"]
    assert approximations.DOCUMENT.read_text() == approximations.document(rows)
    assert {row["name"] for row in rows} == {subject.name for subject in approximations.subjects()}
    assert set(FUNCTIONS) <= {row["name"] for row in rows}
    assert all(row["within"] for row in rows)
    assert approximations.PICTURE.stat().st_size > 10_000
