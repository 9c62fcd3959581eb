"""Training of the bundled model; run from the repository root, see ``training/README.md``."""
