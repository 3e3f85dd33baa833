#!/bin/sh
# onnx 1.23.2, onnxruntime 1.32.0, skl2onnx 1.20.0: a file that imports the default operator set twice.
#
# One would expect:  whoever reads such a file takes the same one of the two entries, or refuses it.
# What happens:      skl2onnx writes a linear regression with two entries for the default domain, of equal version.
#                    onnx.version_converter raises or lowers the first of them and leaves the other, so that the two now
#                    differ; onnx.checker accepts the result. Of two that differ onnxruntime takes the last one, onnx's
#                    ReferenceEvaluator the greater one: they compute different numbers from one file, without a word.
#                    (Softmax up to version 12 sums over all axes from `axis` on, from 13 on over one.)
# Output seen:       versions [17, 17] written; [18, 17] and [13, 17] after convert_version; a file with 13 before 11 is
#                    Softmax 11 to onnxruntime and Softmax 13 to the reference.
#
# Runs no code of ours. Exit status 0: as written here; 1: it behaves differently now.   sh findings/NAME.sh
set -eu
PYTHON="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT INT TERM
"$PYTHON" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --disable-pip-version-check --quiet --only-binary :all: \
    onnx==1.23.2 onnxruntime==1.32.0 skl2onnx==1.20.0 scikit-learn==1.9.1 numpy==2.4.6
HOME="$work" ORT_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - <<'PROGRAM'
import sys

import numpy as np
import onnx
import onnxruntime
import skl2onnx
from onnx import TensorProto, helper, version_converter
from onnx.reference import ReferenceEvaluator
from sklearn.linear_model import LinearRegression

failed = False


def expect(what, seen, wanted):
    global failed
    print(f"{what:58} {seen}")
    if seen != wanted:
        print(f"  differs; it was: {wanted}")
        failed = True


def versions(model):
    return [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]


def softmax(*opsets):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", n) for n in opsets])
    onnx.checker.check_model(model, full_check=True)
    return model


def meant(y):
    """Tell from the sums which version of Softmax made an array of 2 x 2 x 2: 1 over the last two axes, or over one."""
    sums = np.asarray(y).reshape(2, 4).sum(axis=1)
    return "as of 11" if np.allclose(sums, 1) else "as of 13" if np.allclose(sums, 2) else f"neither: {sums}"


data = np.arange(8, dtype=np.float32).reshape(4, 2)
fitted = LinearRegression().fit(data, data @ [1.0, 2.0])
written = skl2onnx.to_onnx(fitted, data[:1], target_opset=17)
expect("skl2onnx, target_opset=17, writes versions", versions(written), [17, 17])
for target in (18, 13):
    converted = version_converter.convert_version(written, target)
    onnx.checker.check_model(converted)
    expect(f"convert_version(..., {target}) leaves", versions(converted), [target, 17])

x = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
for opsets, ort in (((11, 13), "as of 13"), ((13, 11), "as of 11")):
    model = softmax(*opsets)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expect(f"Softmax of a file that imports {opsets}: onnxruntime", meant(session.run(None, {"x": x})[0]), ort)
    reference = ReferenceEvaluator(model).run(None, {"x": x})[0]
    expect(f"Softmax of a file that imports {opsets}: reference", meant(reference), "as of 13")
sys.exit(failed)
PROGRAM
