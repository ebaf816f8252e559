"""A board's data: files in, micro-batches out."""
