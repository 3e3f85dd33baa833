"""Operators against onnxruntime: onnx's own tests, and generated cases."""
