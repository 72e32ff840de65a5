"""Notebooks: as short as promised, stripped, and they run."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import finished_arms
import nbclient
import nbformat
import pytest
from commands import ROOT, environment

from mgrpo_jax import atomic
from mgrpo_jax.report import results

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
AT_WORK = ROOT / "notebooks" / "01_a_team_at_work.ipynb"
ARMS = ROOT / "notebooks" / "04_arms.ipynb"
DEADLINE = 300  # seconds; it takes 30 on two free cores
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS]
)


def code_of(cell):
  """A cell as plain Python, shell and magic lines left out."""
  lines = cell.source.splitlines()
  kept = [re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines]
  return ast.parse("\n".join(kept))


def code_cells(path):
  cells = nbformat.read(path, as_version=4).cells
  return [cell for cell in cells if cell.cell_type == "code"]


def execute(notebook, directory):
  client = nbclient.NotebookClient(
      notebook,
      timeout=DEADLINE,
      kernel_name="python3",
      resources={"metadata": {"path": str(directory)}},
  )
  client.execute(env=environment())


def printed(cell):
  """What a cell wrote to its standard output."""
  return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def drawings(notebook):
  """Everything that cells showed as HTML."""
  shown = [
      output.data.get("text/html", "")
      for cell in notebook.cells
      if cell.cell_type == "code"
      for output in cell.outputs
      if output.output_type in ("display_data", "execute_result")
  ]
  return [html for html in shown if html]


@each_notebook
def test_it_is_short_and_numbered(path):
  assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
  assert len(nbformat.read(path, as_version=4).cells) <= 25


@each_notebook
def test_it_defines_nothing_over_five_lines(path):
  for cell in code_cells(path):
    for node in ast.walk(code_of(cell)):
      if isinstance(node, DEFINITIONS):
        assert node.end_lineno - node.lineno < 5, ast.unparse(node)


@each_notebook
def test_it_uses_the_library(path):
  modules = {
      node.module
      for cell in code_cells(path)
      for node in ast.walk(code_of(cell))
      if isinstance(node, ast.ImportFrom)
  }
  assert any(name.split(".")[0] == "mgrpo_jax" for name in modules)


@each_notebook
def test_it_is_stripped(path):
  nbformat.validate(nbformat.read(path, as_version=4))
  result = subprocess.run(
      [sys.executable, "-m", "nbstripout", "--verify", str(path)],
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  for cell in code_cells(path):
    assert not cell.outputs and cell.execution_count is None


@each_notebook
def test_its_lines_fit(path):
  for cell in nbformat.read(path, as_version=4).cells:
    for line in cell.source.splitlines():
      assert len(line) <= 80 or "python -m" in line, line


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """What the notebooks need of the repository, without its git history."""
  root = tmp_path_factory.mktemp("checkout")
  for name in ("configs", "experiments", "mgrpo_jax", "notebooks"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, root / name, ignore=ignored)
  return root


@pytest.fixture(scope="module")
def executed(checkout):
  """The notebook as it comes out of a run in its own folder."""
  notebook = nbformat.read(AT_WORK, as_version=4)
  execute(notebook, checkout / "notebooks")
  return notebook


def test_it_draws_a_tree_with_rewards_and_advantages(executed):
  (html,) = drawings(executed)
  assert html.count('class="role">main<') == 1
  assert html.count('class="role">researcher') >= 1
  for role in ("prompt", "sampled", "result"):
    assert html.count(f'class="token {role}" title') > 0
  assert html.count('<tr class="root') == 8  # K rollouts
  bars = [float(w) for w in re.findall(r"width:([\d.]+)%", html)]
  assert max(bars) == 50.0  # somebody did better than somebody else


def test_its_text_agrees_with_its_numbers(executed):
  told = "".join(
      printed(cell) for cell in executed.cells if cell.cell_type == "code"
  )
  assert "16 questions" in told and "128 rollouts" in told
  assert int(re.search(r"(\d+) totals follow", told)[1]) >= 16
  low, high = re.search(r"advantages +from (\S+) to (\S+)", told).groups()
  assert float(low) < 0 < float(high)


@pytest.mark.parametrize(
    ("name", "told", "drawn"),
    [
        ("02_advantages_by_hand", r"by sub-task \[ 1\. -1\.  0\.\]", 0),
        ("03_alignment", r"inverse_count: rollouts weigh \[0\. 1\. 1\.", 1),
    ],
)
def test_equations_stand_beside_arrays(checkout, name, told, drawn):
  notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
  execute(notebook, checkout / "notebooks")
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert re.search(told, "".join(map(printed, cells)))
  assert len(drawings(notebook)) == drawn


def pictures(notebook):
  """How many PNG files cells showed."""
  return sum(
      "image/png" in output.get("data", {})
      for cell in notebook.cells
      if cell.cell_type == "code"
      for output in cell.outputs
  )


def test_arms_are_read_drawn_and_run(checkout):
  notebook = nbformat.read(ARMS, as_version=4)
  execute(notebook, checkout / "notebooks")
  told = "".join(
      printed(cell) for cell in notebook.cells if cell.cell_type == "code"
  )
  (table,) = drawings(notebook)
  kept = results.read(ROOT / "experiments/results/arms.json")
  for arm in {run["arm"] for run in kept["runs"]}:
    assert f"<td>{arm}</td>" in table
  assert pictures(notebook) == 3
  assert re.search(r"co_train: 3 steps, \d+ tokens, nats {'main'", told)
  assert re.search(r"sub_only: 5 steps, \d+ tokens, nats {'researcher'", told)


def test_any_arms_and_seeds_can_be_shown(checkout, tmp_path):
  for seed in (3, 5):
    finished_arms.make_run(tmp_path / "runs", "old", seed)
  finished_arms.make_run(tmp_path / "runs", "new<er", 5, worse=0.1)
  alone = finished_arms.make_run(tmp_path / "runs", "still", 4)
  (alone / "metrics.jsonl").write_text("")
  kept = finished_arms.collect(tmp_path, baseline="old", note="by hand")
  atomic.write_json(tmp_path / "arms.json", kept)
  notebook = nbformat.read(ARMS, as_version=4)
  notebook.cells = [c for c in notebook.cells if "small_setup(" not in c.source]
  second = next(c for c in notebook.cells if "RESULTS" in c.source)
  name = "experiments/results/arms.json"
  second.source = second.source.replace(name, str(tmp_path / "arms.json"))
  execute(notebook, checkout / "notebooks")
  (table,) = drawings(notebook)
  assert "<td>new&lt;er</td>" in table and "<td>still</td>" in table
  assert pictures(notebook) == 3
  told = "".join(
      printed(cell) for cell in notebook.cells if cell.cell_type == "code"
  )
  assert "new<er less old: -0.100 at" in told


def test_it_leaves_nothing_behind(executed, checkout):
  made = {path.name for path in checkout.iterdir()}
  made |= {path.name for path in (checkout / "notebooks").iterdir()}
  wanted = {"configs", "experiments", "mgrpo_jax", "notebooks"}
  assert made == wanted | {path.name for path in NOTEBOOKS}


def first_cell_then(line):
  """A notebook of the first code cell and one more line."""
  notebook = nbformat.read(AT_WORK, as_version=4)
  first = next(c for c in notebook.cells if c.cell_type == "code")
  notebook.cells = [first, nbformat.v4.new_code_cell(line)]
  return notebook


def test_it_starts_in_the_root_too(checkout):
  notebook = first_cell_then("import configs; print(configs.__file__)")
  execute(notebook, checkout)
  found = pathlib.Path(printed(notebook.cells[-1]).strip())
  assert found == checkout / "configs" / "__init__.py"


def test_it_clones_where_there_is_no_repository(checkout, tmp_path):
  origin = tmp_path / "origin"
  shutil.copytree(checkout, origin)
  subprocess.run(["git", "init", "--quiet"], cwd=origin, check=True)
  subprocess.run(["git", "add", "."], cwd=origin, check=True)
  identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
  subprocess.run(
      ["git", *identity, "commit", "--quiet", "-m", "all"],
      cwd=origin,
      check=True,
  )
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  notebook = first_cell_then("import configs; print(configs.__file__)")
  head = notebook.cells[0]
  head.source = head.source.replace('= ""', f'= "file://{origin}"')
  execute(notebook, elsewhere)
  found = pathlib.Path(printed(notebook.cells[-1]).strip())
  assert found == elsewhere / "clone" / "configs" / "__init__.py"


def test_it_says_what_to_do_where_there_is_no_repository(tmp_path):
  with pytest.raises(nbclient.exceptions.CellExecutionError) as refused:
    execute(first_cell_then(""), tmp_path)
  assert "REPOSITORY" in str(refused.value)
