"""Arrow 2: agents, their protocols and their tools."""
