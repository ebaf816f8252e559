"""The server of a run: broker, journal, coordinator shell."""
