"""The ways in which a tool or a machine can go wrong."""


class ToolError(Exception):
  """A tool cannot do what it was asked; its message is shown to the model."""


class InfrastructureError(Exception):
  """A machine, server or tool broke; the call is FAILED and tried again."""


class LateTurnError(InfrastructureError):
  """A turn was not sampled before its deadline."""
