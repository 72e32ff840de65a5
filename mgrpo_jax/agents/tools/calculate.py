"""Arithmetic, read from a syntax tree and bounded in size."""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from mgrpo_jax.agents.errors import ToolError
from mgrpo_jax.agents.tools.tool import Memory, Observation, Tool, text_schema

Number = int | float

_MAX_CHARS = 200
_MAX_MAGNITUDE = 1e30
_LONGEST = 32  # characters of the longest result
_WRITTEN = re.compile(r"[0-9eE_.+\-*/%()\s]*")  # all that arithmetic needs
_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"})
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def evaluate(expression: str) -> Number:
  """The value of an arithmetic expression.

  Numbers (also with grouping commas), `+ - * / // % **`, parentheses.

  Args:
    expression: at most 200 characters.

  Returns:
    Its value, exact for whole numbers.

  Raises:
    ToolError: it is no such expression, or a value exceeds 1e30.
  """
  if len(expression) > _MAX_CHARS:
    raise ToolError(f"expression longer than {_MAX_CHARS} characters")
  text = _GROUPS.sub("", expression.translate(_SIGNS)).strip()
  if not _WRITTEN.fullmatch(text):  # Python would warn about some words
    raise ToolError("not an arithmetic expression")
  try:
    tree = ast.parse(text, mode="eval")
    return _value(tree.body)
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise ToolError("not an arithmetic expression") from error
  except ZeroDivisionError as error:
    raise ToolError("division by zero") from error
  except OverflowError as error:
    raise ToolError("number too large") from error


def compute(expression: str) -> str:
  """The value of an arithmetic expression, as it is shown.

  Args:
    expression: see `evaluate`.

  Returns:
    Whole numbers in full, others to ten significant digits.

  Raises:
    ToolError: see `evaluate`.
  """
  return _format(evaluate(expression))


def calculate(*, deadline: float, max_chars: int) -> Tool:
  """The tool `calculate`.

  Args:
    deadline: seconds.
    max_chars: characters of the result, at least 32, so that no number is
      ever shown without its last digits.

  Returns:
    The tool.

  Raises:
    ValueError: `max_chars` is below 32.
  """
  if max_chars < _LONGEST:
    raise ValueError(f"max_chars: is {max_chars}, must be >= {_LONGEST}")

  async def run(arguments: Mapping[str, Any], memory: Memory) -> Observation:
    del memory  # arithmetic needs none
    return Observation(text=compute(arguments["expression"]))

  return Tool(
      name="calculate",
      description="Compute an arithmetic expression.",
      schema=text_schema("expression", "For example (1,200 - 7) / 3."),
      run=run,
      deadline=deadline,
      max_chars=max_chars,
  )


def _value(node: ast.expr) -> Number:
  """The value of a node, each intermediate value bounded."""
  if isinstance(node, ast.Constant) and not isinstance(node.value, bool):
    if isinstance(node.value, int | float):
      return _bounded(node.value)
  if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
    return _UNARY[type(node.op)](_value(node.operand))
  if isinstance(node, ast.BinOp):
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Pow):
      return _power(left, right)
    if type(node.op) in _BINARY:
      return _bounded(_BINARY[type(node.op)](left, right))
  raise ToolError("not an arithmetic expression")


def _power(base: Number, exponent: Number) -> Number:
  """A power, its size known before it is computed."""
  if base < 0 and exponent != int(exponent):
    raise ToolError("root of a negative number")
  if base == 0:
    return _bounded(base**exponent)
  digits = abs(exponent) * abs(math.log10(abs(base)))
  if digits > math.log10(_MAX_MAGNITUDE):
    raise OverflowError
  return _bounded(base**exponent)


def _bounded(value: Number) -> Number:
  """The value, unless it is too large or not finite."""
  if not abs(value) <= _MAX_MAGNITUDE:
    raise OverflowError
  return value


def _format(value: Number) -> str:
  """Whole numbers in full, others to ten significant digits."""
  if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
    value = int(value)
  return str(value) if isinstance(value, int) else f"{value:.10g}"
