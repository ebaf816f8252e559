"""Experiments that answer the paper's claims one by one: ``python -m fedzo.experiments NAME``."""
