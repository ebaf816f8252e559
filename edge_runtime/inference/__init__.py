"""Forward passes: graphs, the sessions that run them, and what they yield."""
