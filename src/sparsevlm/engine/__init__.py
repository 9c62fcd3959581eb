"""The fast path: the decoder over packed samples. Equal to the plain path, its reference in tests."""
