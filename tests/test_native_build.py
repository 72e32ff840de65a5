"""What is compiled where it runs: once, safely, and errors say what to do."""

import os
import pathlib
import shutil
import stat
import sys
import time

import commands
import pytest
from compiled import needs_compiler

from mgrpo_jax.policy.native import build, targets

SHOW = (
    "from mgrpo_jax.policy.native import build;"
    "print(build.library().MgrpoTileColumns())"
)


STARTED = "child = subprocess.Popen(['sleep', '600'])"


def assert_ended(number):
  """A process has ended, or does so in a moment."""
  child = pathlib.Path(f"/proc/{number}/stat")
  for _ in range(100):
    if not child.exists() or child.read_text().split()[2] == "Z":
      return
    time.sleep(0.05)
  raise AssertionError("what the compiler had started lives on")


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty one."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  return tmp_path / "mgrpo_jax"


def compiler(folder, text):
  """One that does what some Python says, `out` being what it is to make."""
  file = folder / "compile"
  file.write_text(
      f"#!{sys.executable}\nimport os, shutil, subprocess, sys, time\n"
      f"out = sys.argv[-1]\n{text}\n"
  )
  file.chmod(0o755)
  return str(file)


@pytest.fixture
def copying(cache, monkeypatch):
  """A compiler that takes no time; what it copies was made before."""
  with monkeypatch.context() as patch:
    patch.delenv("XDG_CACHE_HOME")
    build._found()
    made = build._place()
  text = f"shutil.copy({str(made)!r}, out)"
  monkeypatch.setenv("CXX", compiler(cache.parent, text))


@needs_compiler
def test_a_program_is_built_once_for_all_processes(cache, monkeypatch):
  first = commands.python("-c", SHOW)
  assert first.returncode == 0, first.stderr
  (made,) = cache.iterdir()
  assert made.suffix == ".so"
  assert stat.S_IMODE(cache.stat().st_mode) == 0o700
  assert stat.S_IMODE(made.stat().st_mode) == 0o600
  before = made.stat()
  monkeypatch.setenv("CXX", "false")
  again = commands.python("-c", SHOW)
  assert (again.returncode, again.stdout) == (0, first.stdout)
  assert made.stat().st_mtime_ns == before.st_mtime_ns


@needs_compiler
@pytest.mark.parametrize(
    "spoil",
    [
        lambda place: place.write_bytes(b""),
        lambda place: place.write_bytes(b"\x7fELF nothing"),
        lambda place: place.mkdir(),
        lambda place: shutil.copy(shutil.which("true"), place),
    ],
    ids=["empty", "garbage", "folder", "another"],
)
def test_what_cannot_be_loaded_is_made_again(cache, copying, spoil):
  cache.mkdir(mode=0o700)
  spoil(build._place())
  if build._place().is_file():
    build._place().chmod(0o600)
  assert build._found().MgrpoTileColumns() > 0
  assert build._loaded(build._place()) is not None


@needs_compiler
def test_what_does_not_load_is_not_kept(cache, monkeypatch, copying):
  good = os.environ["CXX"]
  bad = "open(out, 'wb').write(b'nothing')"
  folder = cache.parent / "bad"
  folder.mkdir()
  monkeypatch.setenv("CXX", compiler(folder, bad))
  with pytest.raises(ValueError, match="made nothing that can be loaded"):
    build._found()
  assert not list(cache.iterdir())
  monkeypatch.setenv("CXX", good)
  build._found()


@needs_compiler
@pytest.mark.parametrize("mode", [0o720, 0o702])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_may_write_to_is_not_loaded(cache, copying, what, mode):
  build._found()
  place = build._place()
  (place if what == "file" else cache).chmod(mode)
  with pytest.raises(ValueError, match="others may write to it"):
    build._found()


@needs_compiler
def test_nothing_is_made_where_others_may_write(cache, copying, monkeypatch):
  cache.mkdir()
  cache.chmod(0o770)
  with pytest.raises(ValueError, match="others may write to it"):
    build._found()
  cache.chmod(0o700)
  monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
  with pytest.raises(ValueError, match="is another user's"):
    build._found()
  assert not list(cache.iterdir())


@needs_compiler
def test_a_compiler_may_leave_others_at_work(cache, copying):
  """Such as a server that keeps what it made; they end with it."""
  file = cache.parent / "compile"
  told = cache.parent / "told"
  # It has the compiler's errors open.
  server = f"{STARTED}\nopen({str(told)!r}, 'w').write(str(child.pid))\n"
  file.write_text(file.read_text() + server)
  began = time.monotonic()
  build._found()
  assert time.monotonic() < began + 50
  assert_ended(told.read_text())


def test_a_program_of_other_sources_has_another_name(tmp_path, monkeypatch):
  names = {build._digest()}
  for change in (*build._SOURCES, *build._HEADERS):
    folder = tmp_path / change
    shutil.copytree(build._FOLDER, folder)
    with (folder / change).open("a") as file:
      file.write("\n")
    with monkeypatch.context() as patch:
      patch.setattr(build, "_FOLDER", folder)
      names.add(build._digest())
  with monkeypatch.context() as patch:
    patch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    names.add(build._digest())
    patch.setattr(build.jax, "__version__", "0")
    names.add(build._digest())
    patch.setattr(pathlib.Path, "read_text", lambda _: "flags : another")
    names.add(build._digest())
  assert len(names) == 1 + 3 + 3


def test_the_sources_are_all_there_is():
  files = {
      path.name
      for path in build._FOLDER.iterdir()
      if path.suffix in (".cc", ".h")
  }
  assert files == {*build._SOURCES, *build._HEADERS}
  text = "".join((build._FOLDER / name).read_text() for name in build._SOURCES)
  assert all(handler in text for handler in targets.HANDLERS.values())


def test_without_a_compiler_it_says_what_to_do(cache, monkeypatch):
  monkeypatch.delenv("CXX", raising=False)
  monkeypatch.setenv("PATH", str(cache))
  assert build.compiler() is None
  with pytest.raises(ValueError, match="no compiler of C.*install one"):
    build._found()
  assert not cache.exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "sys.exit('in file b:\\na.cc:3: error: bad\\ncompilation ended')",
            "failed: a.cc:3: error: bad",
        ),
        ("sys.exit('no\\nlast words')", "failed: last words"),
        ("sys.exit(7)", "failed: code 7"),
        ("os.kill(os.getpid(), 9)", "failed: code -9"),
        ("os.write(2, b'\\xff\\xfe error'); sys.exit(1)", "failed: .* error"),
        ("", "made nothing that can be loaded"),
        ("os.mkdir(out)", "made nothing that can be loaded"),
    ],
)
def test_a_compiler_that_fails_is_quoted(cache, monkeypatch, text, match):
  monkeypatch.setenv("CXX", compiler(cache.parent, text))
  with pytest.raises(ValueError, match=match):
    build._found()
  assert not list(cache.iterdir())


def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    cache, monkeypatch, tmp_path
):
  told = tmp_path / "told"
  text = (
      f"{STARTED}\n"
      f"open({str(told)!r}, 'w').write(str(child.pid))\n"
      "time.sleep(600)"
  )
  monkeypatch.setenv("CXX", compiler(cache.parent, text))
  monkeypatch.setattr(build, "_TIMEOUT", 3)
  with pytest.raises(ValueError, match="it took more than 3 s"):
    build._found()
  assert_ended(told.read_text())


@pytest.mark.parametrize(
    ("cxx", "match"),
    [
        ("no_such_compiler -O3", "no_such_compiler failed"),
        ("g++ '", "CXX: No closing quotation"),
    ],
)
def test_a_compiler_that_is_not_there_is_named(cache, monkeypatch, cxx, match):
  monkeypatch.setenv("CXX", cxx)
  with pytest.raises(ValueError, match=match):
    build._found()


def test_options_of_a_compiler_stay_with_it(monkeypatch):
  monkeypatch.setenv("CXX", "clang++ -O2 '-DA=b c'")
  assert build.compiler() == ["clang++", "-O2", "-DA=b c"]


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch, cache):
  file = tmp_path / "file"
  file.touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(file))
  with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
    build._found()


def test_who_has_no_home_is_told(monkeypatch, cache):
  def missing():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(pathlib.Path, "home", missing)
  monkeypatch.setenv("XDG_CACHE_HOME", "")
  with pytest.raises(ValueError, match="home directory.*XDG_CACHE_HOME"):
    build._found()


@pytest.mark.parametrize("named", ["", "somewhere/else"])
def test_a_cache_that_is_no_absolute_path_is_in_the_home(monkeypatch, named):
  monkeypatch.setenv("HOME", "/nobody")
  monkeypatch.setenv("XDG_CACHE_HOME", named)
  assert build._place().parent == pathlib.Path("/nobody/.cache/mgrpo_jax")


def test_a_recipe_that_cannot_be_followed_ends_in_one_line(
    tmp_path, cache, monkeypatch
):
  monkeypatch.setenv("CXX", "no_such_compiler")
  for key, value in (("kernels", "tiled"), ("decode_attention", "native")):
    result = commands.command(
        "train",
        "--config=configs/quickstart.py:smoke",
        f"--config.policies.researcher.execution.{key}={value}",
        f"--workdir={tmp_path / 'run'}",
    )
    line = commands.refused(result)
    assert f"config.policies.researcher.execution.{key}: no_such_comp" in line
  assert not pathlib.Path(tmp_path / "run").exists()
