"""How much memory and time a run takes: planned, kept within limits, measured."""
