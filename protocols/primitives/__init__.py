"""What one machine computes: ring, randomness, AES, comparison keys, kernels; no party and no message."""
