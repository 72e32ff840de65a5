"""What ends a job because of another one."""


class AbsentError(RuntimeError):
  """Another job gave no sign of life for too long; says which."""


class StuckJobsError(RuntimeError):
  """This job and another one wait for each other; says for what."""


class ClaimedError(RuntimeError):
  """Another run directory has this policy's job; says which."""


class ServerError(RuntimeError):
  """Others cannot call this job, or not any more; says why."""
