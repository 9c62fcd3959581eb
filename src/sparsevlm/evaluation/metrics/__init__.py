"""Scores of answers, and intervals of what pruning retains."""
