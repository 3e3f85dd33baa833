"""Measurements; each is run as `python -m benchmarks.NAME` from the root."""

import os

# Before anything imports onnxruntime, and for all processes that benchmarks start (docs/privacy.md). Not from
# securemtk.support.silence: SPU's environment runs a file of this package and has no securemtk.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
