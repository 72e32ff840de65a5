"""What is only tested where there is a compiler."""

import pytest

from mgrpo_jax.policy.native import build

needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="there is no compiler of C++"
)
