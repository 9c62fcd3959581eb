"""What a model gains on the user's own device: ``sparsevlm bench``."""
