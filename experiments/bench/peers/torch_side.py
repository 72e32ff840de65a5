"""Values and gradients of functions of torch, as arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experiments.bench.peers.compare import Numbers


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
  """Copies an array.

  Args:
    values: of any type.
    dtype: of the copy.

  Returns:
    The tensor.
  """
  return torch.tensor(np.asarray(values), dtype=dtype)


def value_and_grad(
    function: Callable[..., torch.Tensor], *arrays: Numbers
) -> tuple[Numbers, ...]:
  """Calls a function in float64 and differentiates it by every argument.

  Args:
    function: of tensors, to a scalar.
    *arrays: its arguments.

  Returns:
    The value, then the gradients; 0 where it does not depend on one.
  """
  inputs = [tensor(array).requires_grad_() for array in arrays]
  value: Any = function(*inputs)
  slopes = torch.autograd.grad(
      value, inputs, allow_unused=True, materialize_grads=True
  )
  return tuple(one.detach().numpy() for one in (value, *slopes))
