"""ONNX files and bundles: read, check, import, export. The project's only door to onnx and onnxruntime.

A file here imports only those above it: problems, reading, runtime, graph, registry,
lower, draft, elementwise, linear, windows, shapes, reductions, norms, roots, rules, net, simplify, merge, tidy,
importer, check, export, bundle.
"""
