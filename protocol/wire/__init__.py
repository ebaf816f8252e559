"""What travels: topics, messages and documents, their bytes, limits and signatures."""
