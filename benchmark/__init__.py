"""Measurements; every row says how it was made."""
