"""CKKS: arithmetic on vectors of approximate numbers, which are added, multiplied and rotated as a whole."""
