"""Multi-Trigger-Key: a multi-task classifier in which each secured task answers truly only to its key.

In import order: keys, assembler, model, train, answers, evaluate. Nothing is imported here: roles need keys and answers
alone, and are started for every session.
"""
