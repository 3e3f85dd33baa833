"""How each family of ONNX operators becomes steps of a program."""
