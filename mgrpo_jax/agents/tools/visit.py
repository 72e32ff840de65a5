"""Opens a passage or a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from mgrpo_jax.agents.errors import ToolError
from mgrpo_jax.agents.tools.tool import Memory, Observation, Passage, Tool


def visit(
    passages: Sequence[Passage], *, deadline: float, max_chars: int
) -> Tool:
  """The tool `visit`: a title line, then the text.

  What to open is the number of a result of this call's last search, the id
  of a passage (`peru/government#capital`), or the id of a page
  (`peru/government`), whose passages are shown one after the other.

  Args:
    passages: what can be opened.
    deadline: seconds.
    max_chars: characters shown of a passage or page.

  Returns:
    The tool.
  """
  by_id = {passage.id: passage for passage in passages}
  pages: dict[str, list[Passage]] = {}
  for passage in passages:
    if "#" in passage.id:
      pages.setdefault(passage.id.split("#")[0], []).append(passage)

  def resolve(wanted: str, memory: Memory) -> str:
    if not wanted.isascii() or not wanted.isdigit():
      return wanted
    if not memory.results:
      raise ToolError("no search results to open, search first")
    number = int(wanted) if len(wanted) < 6 else 0
    if not 1 <= number <= len(memory.results):
      raise ToolError(f"no result {wanted[:6]}, 1 to {len(memory.results)}")
    return memory.results[number - 1]

  async def run(arguments: Mapping[str, Any], memory: Memory) -> Observation:
    key = resolve(str(arguments["page"]).strip(), memory)
    if key in by_id:
      passage = by_id[key]
      text = f"{passage.title}\n{passage.text}"
      return Observation(text=text, page=passage.id)
    if key in pages:
      parts = (f"{passage.title}\n{passage.text}" for passage in pages[key])
      return Observation(text="\n".join(parts), page=key)
    raise ToolError("no such page, give the number of a search result")

  schema = {
      "type": "object",
      "properties": {
          "page": {
              "type": ["string", "integer"],
              "description": "The number of a search result, or a page id.",
          }
      },
      "required": ["page"],
  }
  return Tool(
      name="visit",
      description="Open a search result and read it.",
      schema=schema,
      run=run,
      deadline=deadline,
      max_chars=max_chars,
  )
