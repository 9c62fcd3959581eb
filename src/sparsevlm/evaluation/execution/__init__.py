"""Runs a model over a suite under every setting and stores the predictions."""
