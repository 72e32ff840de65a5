"""What a tool is, and how one is run within its limits."""

import dataclasses
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Literal, Protocol

from mgrpo_jax.agents.deadline import DeadlineExceededError, within
from mgrpo_jax.agents.errors import InfrastructureError, ToolError
from mgrpo_jax.agents.protocol import Function, scrub

ERROR = "error: "  # how a result begins that says why there is none


class Passage(Protocol):
  """What the tools need of a document."""

  @property
  def id(self) -> str:
    """Unique; `page#field` where it is part of a page."""

  @property
  def title(self) -> str:
    """One line."""

  @property
  def text(self) -> str:
    """The content."""


@dataclasses.dataclass
class Memory:
  """What the tools of one agent call remember between its turns.

  Attributes:
    results: ids of the passages that the last search listed.
  """

  results: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
  """What a tool returns.

  Attributes:
    text: for the model.
    page: id of the passage that was opened; empty where none was.
    outcome: `ok`; `error` for a refusal, `timeout` past the deadline.
  """

  text: str
  page: str = ""
  outcome: Literal["ok", "error", "timeout"] = "ok"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
  """An async function that an agent may use.

  Attributes:
    name: how it is addressed.
    description: one sentence for the model.
    schema: JSON schema of its arguments, an object of scalar properties.
    run: (arguments, the call's memory) to what it observed; raises
      `ToolError` where it cannot do what was asked, `InfrastructureError`
      where something broke.
    deadline: seconds it may take.
    max_chars: characters of its text that are kept.
  """

  name: str
  description: str
  schema: Mapping[str, Any]
  run: Callable[[Mapping[str, Any], Memory], Coroutine[Any, Any, Observation]]
  deadline: float
  max_chars: int

  def __post_init__(self) -> None:
    """Checks the limits."""
    if self.deadline <= 0:
      raise ValueError(
          f"tool {self.name!r}: deadline is {self.deadline} s, must be > 0"
      )
    if self.max_chars < 1:
      raise ValueError(
          f"tool {self.name!r}: max_chars is {self.max_chars}, must be >= 1"
      )

  @property
  def function(self) -> Function:
    """The tool as protocols see it."""
    return Function(
        kind="tool",
        name=self.name,
        description=self.description,
        schema=self.schema,
    )


def text_schema(name: str, description: str) -> dict[str, Any]:
  """The schema of one required string argument."""
  properties = {name: {"type": "string", "description": description}}
  return {"type": "object", "properties": properties, "required": [name]}


async def run_tool(
    tool: Tool, arguments: Mapping[str, Any], memory: Memory
) -> Observation:
  """Runs a tool within its deadline and size limit.

  A tool that does not heed its cancellation is left behind, not waited for.

  Args:
    tool: what to run.
    arguments: checked against its schema.
    memory: of the agent call.

  Returns:
    What it observed, cut to `max_chars`; a refusal or a missed deadline is
    an observation too.

  Raises:
    InfrastructureError: it broke, or raised what a tool must not raise.
  """
  try:
    observation = await within(tool.deadline, tool.run(arguments, memory))
  except DeadlineExceededError as error:
    observation = Observation(
        text=f"{ERROR}{tool.name} {error}", outcome="timeout"
    )
  except ToolError as error:
    observation = Observation(text=f"{ERROR}{error}", outcome="error")
  except InfrastructureError:
    raise
  except Exception as error:
    raise InfrastructureError(
        f"tool {tool.name!r} raised {type(error).__name__}: {error}"
    ) from error
  text = scrub(observation.text)[: tool.max_chars]
  return dataclasses.replace(observation, text=text)
