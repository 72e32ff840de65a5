"""What recipes for accelerators have in common."""

import ml_collections


def on_accelerator(
    policy: ml_collections.ConfigDict, architecture: str
) -> None:
  """Sets how one policy runs: bfloat16, layers looped and recomputed.

  Args:
    policy: of the recipe; changed.
    architecture: a function of `configs.architectures`.
  """
  policy.architecture = architecture
  policy.dtype = "bfloat16"
  policy.execution.attention = "splash"
  policy.execution.remat = "attention"
  policy.execution.scan_layers = True
  policy.execution.logit_columns = 1024


def lengths(
    config: ml_collections.ConfigDict, *, context: int, rows: int
) -> None:
  """Sets how long trajectories are, and a micro-batch of one in each row.

  Args:
    config: the recipe; changed.
    context: tokens of the longest trajectory.
    rows: of a micro-batch.
  """
  for role in config.team.roles.values():
    role.max_context = context
    role.max_new_tokens = min(4096, context // 4)
  config.batch.rows = rows
  config.batch.row_tokens = context
  config.batch.row_targets = 0  # a call may sample most of a row
  config.batch.least_shared = 0  # rows hold one call, and splash shares nothing
  config.batch.trajectories = rows
  config.engine.context = context
  config.engine.block = context
  config.engine.prefill_tokens = 4096
  config.engine.prefill_buckets = (256, 1024, min(4096, context))
