"""What calls are compared with: a normaliser, and what it is given."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Float, Int

from mgrpo_jax import advantages

Advantage = Callable[..., Array]  # one of `advantages`' normalisers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """What the slots of a step are compared with, see `alike`.

  Attributes:
    root: rewards, weights [B, K, 1] -> advantages of the root's calls.
    calls: the same of the other roles' calls, [B, K, D].
    given: what `calls` is given: `rewards` as the root; with `subtasks` also
      the number of what was asked, by that name; with `parents` the root's
      advantages in place of the rewards.
  """

  root: Advantage
  calls: Advantage
  given: Literal["rewards", "subtasks", "parents"] = "rewards"

  @property
  def in_groups(self) -> bool:
    """Whether there are groups, or rewards are left as they are."""
    return self.calls is not advantages.plain

  def of_calls(
      self,
      earned: Float[Array, "B K D"],
      weights: Float[Array, "B K D"],
      *,
      subtasks: Int[Array, "B K D"],
      roots: Float[Array, "B K 1"],
  ) -> Float[Array, "B K D"]:
    """Compares the aligned calls of a role that is not the root.

    Args:
      earned: rewards of the slots, float32.
      weights: of the slots, from the alignment.
      subtasks: number of what was asked of each, int32.
      roots: advantages of the rollouts' roots, float32.

    Returns:
      A, float32.
    """
    if self.given == "subtasks":
      return self.calls(earned, weights, subtasks=subtasks)
    if self.given == "parents":
      return self.calls(roots, weights)
    return self.calls(earned, weights)


def alike(advantage: Advantage) -> Comparison:
  """Compares the calls of every role the same way.

  Args:
    advantage: a normaliser of rewards and weights.

  Returns:
    The comparison.
  """
  return Comparison(root=advantage, calls=advantage)
