"""Measurements of fedzo on this machine: ``python -m benchmarks.NAME [--json]``."""
