"""Shared by both paths: a request, its prune step, the session of a model."""
