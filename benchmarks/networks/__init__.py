"""The networks that benchmarks run, as torch modules and as ONNX files."""
