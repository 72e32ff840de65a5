"""Who may import whom."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "mgrpo_jax"

PURE = (
    "types",
    "fields",
    "numerics",
    "alignment",
    "advantages",
    "comparison",
    "losses",
    "importance",
    "critic",
    "objectives",
    "grades",
    "dynamic",
    "update",
    "minibatches",
    "rewards",
    "answers",
    "optim",
    "packing",
    "prefixes",
    "sharding",
    "agents.chat",
    "agents.protocol",
    "agents.compact",
    "agents.chat",
    "agents.chats.chatml",
    "agents.chats.compact",
    "agents.chats.gemma3",
    "agents.chats.llama3",
    "agents.hermes",
    "agents.llama",
    "agents.team",
    "decoupled.codec",
    "decoupled.wire",
    "policy.config",
    "policy.params",
    "policy.policy",
    "policy.transformer",
    "policy.products",
    "policy.native.targets",
    "policy.native.tiles",
    "policy.attention",
    "policy.cache",
    "policy.decode",
    "policy.online",
    "policy.paged",
    "policy.filters",
    "policy.sampling",
    "policy.logprobs",
    "sampler.exchange",
    "sampler.interface",
    "sampler.stream",
    "sampler.spelling",
    "serving.conversation",
    "serving.errors",
    "serving.metrics",
    "serving.prompt",
    "serving.reading",
    "serving.request",
    "serving.response",
    "serving.text",
    "serving.token_request",
    "serving.token_response",
    "testing.batches",
    "testing.estimators",
    "testing.game",
)
IMPURE = {
    "asyncio",
    "io",
    "logging",
    "os",
    "pathlib",
    "random",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
}
SPEAKING = {"breakpoint", "input", "open", "print"}
# Arrows that meet only in the loop: none imports another.
STAGES = ("tasks", "agents", "rewards", "alignment", "advantages", "losses")


def name_of(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
  """Every module that a file imports, wherever in the file."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found.add(node.module)
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def imported_modules(path):
  """What a file imports, as modules where the names are modules."""
  tree = ast.parse(path.read_text())
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= (names & MODULES.keys()) or {node.module}
  return found


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_impure(module):
  tops = {
      name.split(".")[0] for name in imports(MODULES[f"mgrpo_jax.{module}"])
  }
  assert not tops & IMPURE


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_open_print_and_ask_nothing(module):
  tree = ast.parse(MODULES[f"mgrpo_jax.{module}"].read_text())
  called = {
      node.func.id
      for node in ast.walk(tree)
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
  }
  assert not called & SPEAKING


def test_there_is_no_circle():
  graph = {
      name: imported_modules(path) & MODULES.keys() - {name}
      for name, path in MODULES.items()
  }
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_each_other(stage):
  others = tuple(f"mgrpo_jax.{name}" for name in STAGES if name != stage)
  for name, path in MODULES.items():
    if name == f"mgrpo_jax.{stage}" or name.startswith(f"mgrpo_jax.{stage}."):
      for target in imports(path):
        wrong = target in others or target.startswith(
            tuple(f"{other}." for other in others)
        )
        assert not wrong, f"{name} imports {target}"


def test_only_the_loop_knows_the_order():
  composers = {
      name
      for name, path in MODULES.items()
      if {"mgrpo_jax.rewards", "mgrpo_jax.publisher"} <= imports(path)
  }
  assert composers == {"mgrpo_jax.run"}


def test_the_library_knows_neither_commands_nor_configs():
  for name, path in MODULES.items():
    tops = {target.split(".")[0] for target in imports(path)}
    assert not tops & {"experiments", "configs", "ml_collections"}, name


def test_the_library_does_not_need_its_tests_helpers():
  for name, path in MODULES.items():
    if not name.startswith("mgrpo_jax.testing"):
      assert not any(t.startswith("mgrpo_jax.testing") for t in imports(path))


def test_oracles_are_plain_numpy():
  for path in (ROOT / "tests/oracles").glob("*.py"):
    tops = {target.split(".")[0] for target in imports(path)}
    assert not tops & {"jax", "mgrpo_jax", "flax", "optax"}, path
