"""Tables of real checkpoints with lmms-eval: ``python -m benchmark.reproduce``; docs/reproduce.md says how."""
