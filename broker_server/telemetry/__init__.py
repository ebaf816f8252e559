"""How a server is watched: metrics, health, events."""
