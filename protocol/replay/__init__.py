"""From scalars to weights, the same bits on every side."""
