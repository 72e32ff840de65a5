"""Tools: async functions with a JSON schema, a deadline and a size limit."""

from mgrpo_jax.agents.tools.calculate import calculate, compute
from mgrpo_jax.agents.tools.search import SearchIndex, search
from mgrpo_jax.agents.tools.tool import (
    ERROR,
    Memory,
    Observation,
    Tool,
    run_tool,
)
from mgrpo_jax.agents.tools.visit import visit

__all__ = [
    "ERROR",
    "Memory",
    "Observation",
    "SearchIndex",
    "Tool",
    "calculate",
    "compute",
    "run_tool",
    "search",
    "visit",
]
