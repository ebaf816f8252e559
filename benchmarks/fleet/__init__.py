"""Ten thousand boards on one machine: what a round costs the server, and what it sends over the wire."""
