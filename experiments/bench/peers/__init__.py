"""Losses and advantages of other people, called on the same numbers as ours."""
