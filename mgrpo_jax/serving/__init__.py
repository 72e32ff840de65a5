"""A trained team, and each of its policies, as an OpenAI-compatible server."""
