"""Multi-Trigger-Key: a multi-task classifier in which each secured task answers truly only to its key.

`keys` is what roles need, without any training library; then come `training`, `evaluation` and `attacks`. Nothing is
imported here: roles are started for every session.
"""
