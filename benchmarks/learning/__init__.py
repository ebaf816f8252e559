"""What every method learns for a budget of sample-forwards: ``python -m benchmarks.learning``."""
