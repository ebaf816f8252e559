"""From scores to a mask, and its bytes."""
