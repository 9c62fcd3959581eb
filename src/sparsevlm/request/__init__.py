"""What both paths share: a request, its prune step, the session of a model."""
