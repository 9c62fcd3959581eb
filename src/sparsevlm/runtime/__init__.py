"""A running model: hooks, pruned cache, masks, attention probe, report of a request; knows no model family."""
