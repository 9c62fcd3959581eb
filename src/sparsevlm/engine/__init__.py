"""The fast path: the decoder over packed samples. Equal to the plain path, which is the truth it is tested against."""
