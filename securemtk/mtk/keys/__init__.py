"""Trigger-keys, who may use them, and the log of who did: what a role needs, without any training library."""
