"""What ends a job because of another one."""


class AbsentError(RuntimeError):
  """Another job gave no sign of life for too long; says which."""
