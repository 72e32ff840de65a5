"""Arrow 1: questions over real documents."""
