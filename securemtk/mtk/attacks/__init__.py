"""Attacks on a keyed model, each with its figure, the figure of chance beside it, and what both mean.

All share `base`, and `suite` runs them. What each shows and does not show stands in docs/attacks.md.
"""
