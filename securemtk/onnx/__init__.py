"""ONNX files and bundles: read, check, import, export. The project's only door to onnx and onnxruntime.

Which file may import which is listed in tests/test_packaging.py: problems, reading, runtime, options and graph know
files; registry, lower, draft and the rules (arithmetic to roots) know operators; net to tidy are passes; importer,
check, export and bundle use them all.
"""
