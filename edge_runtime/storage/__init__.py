"""What a board keeps on its disk: identity, artifact, outbox, residual, trusted key."""
