"""Who may take part, and what proves who is who."""
