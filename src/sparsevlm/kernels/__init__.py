"""Hot functions in plain torch and in Triton. Each module holds the reference and the choice between the two."""
