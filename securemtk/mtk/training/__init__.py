"""Multi-trigger-key training: keyed samples, decoupling, the multi-task model."""
