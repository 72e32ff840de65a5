"""A policy: a configuration, a pytree of parameters, pure functions."""
