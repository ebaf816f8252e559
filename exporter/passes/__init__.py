"""Graph passes, one a module."""
