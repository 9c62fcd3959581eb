"""The Triton twins; importing a module here imports Triton."""
