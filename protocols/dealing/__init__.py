"""Correlated randomness: what the dealer makes, how it travels, and where it waits."""
