"""Keeper, authority and user: their messages, their processes, and the session that joins them."""
