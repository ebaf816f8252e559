"""The device's state machine, and how it keeps up with a run."""
