"""Runners of other systems on the networks of `benchmarks.models`; nothing here imports ours."""
