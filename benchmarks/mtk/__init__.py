"""Experiments with keyed models, and the page of their results."""
