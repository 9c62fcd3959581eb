"""The Triton versions; importing a module here imports Triton."""
