"""Attacks on a keyed model, each with its figure, the figure of chance beside it, and what both mean.

In import order: base, guess, invert, infer, finetune, membership, suite. What each shows and does not show stands in
docs/attacks.md.
"""
