"""ONNX files and bundles: read, check, import, export. The project's only door to onnx and onnxruntime.

`model` knows files, `building` and `rules` know operators, `passes` make programs smaller; the files here use them all.
"""
