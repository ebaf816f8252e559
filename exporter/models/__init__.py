"""Models that fedzo brings along."""
