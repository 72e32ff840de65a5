"""What a run shows: progress line, rollout records, curves and the report."""
