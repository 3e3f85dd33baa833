"""Folders of runs: what training leaves, and what is released of it."""
