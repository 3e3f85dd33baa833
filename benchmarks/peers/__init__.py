"""Runners of other systems on the networks of `benchmarks.networks.models`; nothing here imports ours."""
