"""Hot functions with Triton twins. Each module holds the plain-torch truth and the choice between the two."""
