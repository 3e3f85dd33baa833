"""Keeper, authority and user as classes over links: they know no processes."""
