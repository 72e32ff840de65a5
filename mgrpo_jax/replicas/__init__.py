"""Samplers of a policy that come and go while a run lasts."""
