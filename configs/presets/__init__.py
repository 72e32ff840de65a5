"""Published methods as configs: each states its source and its values."""
