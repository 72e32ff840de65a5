"""Programs that run in other people's environments, one request at a time."""
