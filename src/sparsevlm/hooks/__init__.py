"""The reference path: hooks on the model's own modules, which prune while these run."""
