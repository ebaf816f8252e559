"""Directions out of seeds, who probes which of them, and gradients as a few coordinates."""
