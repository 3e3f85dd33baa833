"""ONNX files: reading them, running them in the clear, and what is known of their values."""
