"""ONNX files and bundles: read, check, import, export. The project's only door to onnx and onnxruntime.

A file here imports only those above it: problems, reading, runtime, graph, registry, lower, operands, arithmetic,
elementwise, logic, linear, windows, shapes, rules, net, formulas, simplify, merge, tidy, importer, check, export,
bundle.
"""
