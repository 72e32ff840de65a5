"""A job per policy: what jobs tell each other, and who waits for whom."""
