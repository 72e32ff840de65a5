"""A run whose policies are sampled by servers."""

import dataclasses
import io

import pytest
from served import LIMITS, serve
from tiny_run import digest, train

from configs import quickstart
from experiments import external, recipe
from mgrpo_jax import store
from mgrpo_jax.resources import Resources
from mgrpo_jax.sampler import dialects
from mgrpo_jax.sampler.connection import Address
from mgrpo_jax.sampler.engine import Engine
from mgrpo_jax.sampler.external import ExternalEngine
from mgrpo_jax.sampler.lease import Server
from mgrpo_jax.serving.policy import Speaker
from mgrpo_jax.serving.weights import Weights
from mgrpo_jax.testing.setup import CONTEXT, small_setup

SIZES = {"seed": 7, "imitation_steps": 1, "steps": 1}


class Sessionless:
  """The engine here, but every turn is prefilled whole, as servers do it."""

  def __init__(self, engine):
    self._engine = engine

  def __getattr__(self, name):
    return getattr(self._engine, name)

  async def __aenter__(self):
    await self._engine.__aenter__()
    return self

  async def __aexit__(self, *exception):
    await self._engine.__aexit__(*exception)

  async def generate(self, tokens, sampling, seed, *, session):
    return await self._engine.generate(tokens, sampling, seed)


def trained(directory, engines):
  """A digest of what a run in miniature comes to, and its summary."""
  setup = small_setup(**SIZES, external=engines)
  summary = train(directory, setup, config={}, stream=io.StringIO())
  return digest(directory), summary["tokens"]


def engine_here(setup):
  """Makes engines as a run makes its own."""

  def make(policy):
    return Engine(policy.config, policy.params, 0, **setup.sampler.engine)

  return make


def test_it_ends_bit_for_bit_where_a_run_sampled_here_ends(tmp_path):
  setup = small_setup(**SIZES)
  make = engine_here(setup)
  here = trained(
      tmp_path / "here",
      {name: lambda p: Sessionless(make(p)) for name in setup.policies},
  )
  engines = {name: make(one) for name, one in setup.policies.items()}
  resources = Resources(setup, store.open("memory://"))
  speakers = [
      Speaker(
          name=name,
          generate=engine.generate,
          context=CONTEXT,
          chat=resources.testing.actors[name].chat,
          protocol=resources.testing.actors[name].protocol,
          tokenizer=setup.policies[name].tokenizer,
          temperature=1.0,
      )
      for name, engine in engines.items()
  ]
  loading = Weights(
      tmp_path / "weights",
      engines=engines,
      configs={name: one.config for name, one in setup.policies.items()},
  )
  limits = dataclasses.replace(LIMITS, max_concurrent=64)
  with serve(
      *speakers, engines=engines, weights=loading, limits=limits
  ) as served:

    def server(name):
      return Server(
          address=Address(
              url=f"http://127.0.0.1:{served.port}/v1", token="",
              max_concurrent=8, timeout=60.0, attempts=3,
          ),
          model=name,
          folder=tmp_path / "weights" / name,
          dialect=dialects.MGRPO,
      )  # fmt: skip

    there = trained(
        tmp_path / "there",
        {
            name: lambda p, name=name: ExternalEngine(
                p, 0, server=server(name), context=CONTEXT
            )
            for name in setup.policies
        },
    )
  assert there == here
  assert here[1]["generated"] > 0


def recipe_with(tmp_path, **fields):
  config = quickstart.get_config()
  one = config.policies.main.external
  one.url, one.folder = "http://127.0.0.1:8000/v1", str(tmp_path / "main")
  for key, value in fields.items():
    one[key] = value
  return config


def test_a_recipe_names_its_servers(tmp_path):
  (tmp_path / "token").write_text("secret-secret-secret\n")
  config = recipe_with(
      tmp_path, dialect="mgrpo", token_file=str(tmp_path / "token"), attempts=2
  )
  recipe.check(config)
  team = recipe.build_team(config)
  (made,) = external.engines(config, team).items()
  assert made[0] == "main"
  *_, context = made[1].args
  server = external._server(*made[1].args[:2])
  assert server.dialect is dialects.MGRPO and server.model == "main"
  assert server.address.token == "secret-secret-secret"
  assert server.address.attempts == 2
  assert context == config.engine.context
  assert "secret" not in str(recipe.plain(config))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"url": "127.0.0.1:8000"}, "external: url must be"),
        ({"url": ""}, "external.folder: .*main', allowed: ''"),
        ({"folder": ""}, "external.folder: '' must be a directory"),
        (
            {"dialect": "sglang"},
            "external.dialect: 'sglang', allowed: mgrpo, vllm",
        ),
        ({"timeout": 0.0}, "external: timeout must be finite"),
        ({"attempts": 0}, "external: attempts must be >= 1"),
        ({"max_concurrent": 0}, "external: max_concurrent must be >= 1"),
    ],
)
def test_impossible_servers_are_refused(tmp_path, fields, told):
  with pytest.raises(ValueError, match=f"config.policies.main.{told}"):
    recipe.check(recipe_with(tmp_path, **fields))


@pytest.mark.parametrize(
    ("dialect", "model", "folder", "told"),
    [
        ("vllm", "other", "other", "external.url"),
        ("mgrpo", "main", "other", "external.url"),
        ("mgrpo", "", "main", "external.folder"),
        ("mgrpo", "", "other", None),
    ],
)
def test_policies_do_not_share_a_servers_model(
    tmp_path, dialect, model, folder, told
):
  config = recipe_with(tmp_path, dialect=dialect)
  other = config.policies.researcher.external
  other.url, other.dialect = config.policies.main.external.url, dialect
  other.model, other.folder = model, str(tmp_path / folder)
  if told is None:
    recipe.check(config)
    return
  with pytest.raises(ValueError, match=f"policies.researcher.{told}"):
    recipe.check(config)


def test_a_sampler_elsewhere_is_not_split_here(tmp_path):
  config = recipe_with(tmp_path)
  config.policies.main.sampler_tensor = 2
  with pytest.raises(ValueError, match="main.sampler_tensor: 2, allowed: 1"):
    recipe.check(config)


@pytest.mark.parametrize("content", [None, "\n"])
def test_a_token_must_be_there(tmp_path, content):
  if content is not None:
    (tmp_path / "token").write_text(content)
  config = recipe_with(tmp_path, token_file=str(tmp_path / "token"))
  engines = external.engines(config, recipe.build_team(config))
  with pytest.raises(ValueError, match="main.external.token_file"):
    engines["main"](None)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(external.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"httpx2.*\.\[external\]"):
    recipe.check(recipe_with(tmp_path))
