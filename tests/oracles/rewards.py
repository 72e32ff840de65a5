"""Eq. 4 and 5 of the paper, as printed."""


def main_reward(*, a1, a2, format_valid, correct):
  if not format_valid:
    return 0.0
  return a1 * 1.0 + a2 * float(correct)


def sub_reward(*, b1, b2, b3, format_valid, main_correct, expert):
  if not format_valid:
    return 0.0
  return b1 * 1.0 + b2 * float(main_correct) + b3 * expert
