"""Runs out of their journals: resumed, replayed, recounted, told."""
