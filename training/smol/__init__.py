"""Training of smol: a vision tower for SmolLM2-135M-Instruct; see ``training/README.md``."""
