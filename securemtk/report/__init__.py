"""One page about a run: what it is, how well its keys open and close, what leaks, what it costs, what is protected.

In import order: threats, facts, encrypted, document, page.
"""
