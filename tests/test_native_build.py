"""What is compiled where it runs: once, and errors say what to do."""

import os
import pathlib
import stat
import sys

import commands
import pytest

from mgrpo_jax.policy.native import build


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty one, and a process that has built nothing yet."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  build.library.cache_clear()
  yield tmp_path / "mgrpo_jax"
  build.library.cache_clear()


def test_a_program_is_built_once_for_all_processes(cache):
  build = "from mgrpo_jax.policy.native import tiles; print(tiles.columns())"
  first = commands.python("-c", build)
  assert first.returncode == 0, first.stderr
  (made,) = cache.iterdir()
  assert made.suffix == ".so"
  assert stat.S_IMODE(cache.stat().st_mode) == 0o700
  before = made.stat()
  os.environ["CXX"] = "false"
  try:
    again = commands.python("-c", build)
  finally:
    del os.environ["CXX"]
  assert (again.returncode, again.stdout) == (0, first.stdout)
  assert made.stat().st_mtime_ns == before.st_mtime_ns


def broken(folder, text):
  """A compiler that says so and fails."""
  file = folder / "compile"
  file.write_text(f"#!{sys.executable}\n{text}\n")
  file.chmod(0o755)
  return str(file)


def test_without_a_compiler_it_says_what_to_do(cache, monkeypatch):
  monkeypatch.delenv("CXX", raising=False)
  monkeypatch.setenv("PATH", str(cache))
  assert build.compiler() is None
  with pytest.raises(ValueError, match="no compiler of C.*install one"):
    build.library()
  assert not cache.exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("import sys; sys.exit('a.cc:3: error: bad')", "failed: a.cc:3: error"),
        ("raise SystemExit(7)", "failed: code 7"),
    ],
)
def test_a_compiler_that_fails_is_quoted(cache, monkeypatch, text, match):
  monkeypatch.setenv("CXX", broken(cache.parent, text))
  with pytest.raises(ValueError, match=match):
    build.library()
  assert not list(cache.iterdir())


def test_a_compiler_that_is_not_there_is_named(cache, monkeypatch):
  monkeypatch.setenv("CXX", "no_such_compiler -O3")
  assert build.compiler() == ["no_such_compiler", "-O3"]
  with pytest.raises(ValueError, match="no_such_compiler failed"):
    build.library()


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch, cache):
  file = tmp_path / "file"
  file.touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(file))
  with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
    build.library()


def test_a_recipe_that_cannot_be_followed_ends_in_one_line(tmp_path, cache):
  os.environ["CXX"] = "no_such_compiler"
  try:
    result = commands.command(
        "train",
        "--config=configs/quickstart.py:smoke",
        "--config.policies.researcher.execution.kernels=tiled",
        f"--workdir={tmp_path / 'run'}",
    )
  finally:
    del os.environ["CXX"]
  line = commands.refused(result)
  assert "config.policies.researcher.execution.kernels: no_such_comp" in line
  assert not pathlib.Path(tmp_path / "run").exists()
