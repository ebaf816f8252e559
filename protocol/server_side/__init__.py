"""The coordinator's state machine, and what a round decides."""
