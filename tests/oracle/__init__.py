"""An in-memory filesystem that says what the real one must answer, and what compares the two."""
