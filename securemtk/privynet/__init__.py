"""Networks split into a local and a cloud part."""
