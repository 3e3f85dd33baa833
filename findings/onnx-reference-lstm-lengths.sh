#!/bin/sh
# onnx 1.23.2, onnxruntime 1.32.0: onnx's ReferenceEvaluator computes an LSTM as if it had no sequence lengths.
#
# One would expect:  the reference implementation of the standard honours an input of the operator, or refuses it.
# What happens:      LSTM has an optional input `sequence_lens`: a sequence ends after so many steps, and the outputs
#                    behind that are zero. ReferenceEvaluator takes the input and computes all steps of all sequences,
#                    without a word; the last state of a short sequence is that of its padding. onnxruntime honours it.
#                    Who tests a backend against the reference with padded batches tests against other numbers.
# Output seen:       with lengths 5 and 2 of 5 steps the reference answers exactly as with 5 and 5; onnxruntime's answer
#                    is zero behind step 2 and differs from it by more than 0.1; with 5 and 5 they agree within 1e-5.
#
# Runs no code of ours. Exit status 0: as written here; 1: it behaves differently now.   sh findings/NAME.sh
set -eu
PYTHON="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT INT TERM
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --disable-pip-version-check --quiet --only-binary :all: \
    onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
HOME="$work" ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PROGRAM'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

STEPS, BATCH, INPUT, HIDDEN = 5, 2, 3, 4
failed = False


def expect(what, seen, wanted):
    global failed
    print(f"{what:62} {seen}")
    if seen != wanted:
        print(f"  differs; it was: {wanted}")
        failed = True


rng = np.random.default_rng(0)
weights = {"w": rng.normal(size=(1, 4 * HIDDEN, INPUT)), "r": rng.normal(size=(1, 4 * HIDDEN, HIDDEN))}
value = helper.make_tensor_value_info
graph = helper.make_graph(
    [helper.make_node("LSTM", ["x", "w", "r", "", "lengths"], ["y", "last"], hidden_size=HIDDEN)],
    "g",
    [value("x", TensorProto.FLOAT, [STEPS, BATCH, INPUT]), value("lengths", TensorProto.INT32, [BATCH])],
    [value("y", TensorProto.FLOAT, [STEPS, 1, BATCH, HIDDEN]), value("last", TensorProto.FLOAT, [1, BATCH, HIDDEN])],
    [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
)
model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 14)])
onnx.checker.check_model(model, full_check=True)
x = rng.normal(size=(STEPS, BATCH, INPUT)).astype(np.float32)
runtime = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def lengths(*each):
    return {"x": x, "lengths": np.array(each, dtype=np.int32)}


def difference(one, other):
    return float(max(np.abs(a - b).max() for a, b in zip(one, other)))


full, cut = lengths(STEPS, STEPS), lengths(STEPS, 2)
reference = ReferenceEvaluator(model)
by_runtime, by_reference = runtime.run(None, cut), reference.run(None, cut)
both_whole = difference(runtime.run(None, full), reference.run(None, full))
expect("all sequences whole: the two agree within 1e-5", both_whole < 1e-5, True)
zero, last = not by_runtime[0][2:, 0, 1].any(), np.array_equal(by_runtime[1][0, 1], by_runtime[0][1, 0, 1])
expect("the second has length 2 of 5: onnxruntime's is zero behind it", bool(zero), True)
expect("  and its last state is that of step 2", bool(last), True)
expect("  the reference answers as for whole sequences", difference(by_reference, reference.run(None, full)), 0.0)
expect("  the two differ by more than 0.1", difference(by_runtime, by_reference) > 0.1, True)
sys.exit(failed)
PROGRAM
