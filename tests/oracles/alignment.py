"""Trajectory alignment written from the paper (Eq. 11), by enumeration."""

import itertools
from fractions import Fraction


def outcomes(num_calls: int, num_slots: int) -> list[tuple[int, ...]]:
  """Lists the equally likely fillings of the slots: copies, or subsets."""
  if num_calls == 0:
    return [()]
  if num_calls > num_slots:
    return list(itertools.combinations(range(num_calls), num_slots))
  calls = tuple(range(num_calls))
  extra = num_slots - num_calls
  return [calls + more for more in itertools.product(calls, repeat=extra)]


def expected_counts(num_calls: int, num_slots: int) -> list[Fraction]:
  """Computes how often each call stands in a slot, on average."""
  fillings = outcomes(num_calls, num_slots)
  return [
      Fraction(sum(filling.count(call) for filling in fillings), len(fillings))
      for call in range(num_calls)
  ]


def inverse_count_weight(num_calls: int, num_slots: int) -> Fraction:
  """Computes the expected weight of one call under inverse_count."""
  filled = min(num_calls, num_slots)
  chosen = Fraction(filled, num_calls)  # probability of standing in a slot
  return chosen * Fraction(1, filled)


def smallest_cover(counts: list[int], coverage: Fraction) -> int:
  """Tries D = 1, 2, … until enough rollouts fit."""
  num_slots = 1
  while Fraction(sum(d <= num_slots for d in counts), len(counts)) < coverage:
    num_slots += 1
  return num_slots
