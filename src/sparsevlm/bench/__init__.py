"""Benchmark of whole ``generate`` calls on the user's device: ``sparsevlm bench``."""
