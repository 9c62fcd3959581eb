"""The algorithm in plain torch: raters, scores, rank, budget, recycling and the selectors; knows no model."""
