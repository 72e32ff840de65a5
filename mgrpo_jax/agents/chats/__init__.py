"""Chat formats, one file for each family of models."""
