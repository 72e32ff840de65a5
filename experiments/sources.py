"""Where the weights of a recipe come from: loaded, or made from scratch."""

import dataclasses
from collections.abc import Mapping

import jax
import ml_collections
import numpy as np

from experiments import checks, placing
from mgrpo_jax.agents import compact
from mgrpo_jax.agents.team import Team
from mgrpo_jax.hosts import spread
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.load import load
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.params import init as init_params
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.policy.tokenizer import (
    SentencePieceTokenizer,
    train_sentencepiece,
)
from mgrpo_jax.sharding import IndivisibleError, Meshes
from mgrpo_jax.tasks import factbook
from mgrpo_jax.tasks.factbook import Factbook


def policies(
    config: ml_collections.ConfigDict,
    team: Team,
    book: Factbook,
    meshes: Mapping[str, Meshes],
) -> dict[str, Policy]:
  """Loads every policy that plays in a run, or makes it from scratch.

  Args:
    config: the whole recipe.
    team: of the recipe.
    book: what a tokenizer made from scratch learns from.
    meshes: where each policy lives.

  Returns:
    Policies by name.

  Raises:
    ValueError: the source of one cannot be loaded, or its mesh does not divide
      it.
  """
  loaded: dict[str, Policy] = {}
  for position, name in enumerate(placing.weighted(config, team)):
    one = config.policies[name]
    if one.source == "random":
      with checks.inside(f"policies.{name}"):
        policy = _random(config, team, book, name, position)
    else:
      with (
          checks.inside(f"policies.{name}.source"),
          checks.inside(f"policies.{name}.mesh", IndivisibleError),
      ):
        policy = _load(one.source, meshes[name].learner)
    sizes = placing.executed(policy.config, config, name, meshes[name])
    loaded[name] = dataclasses.replace(policy, config=sizes)
    if placing.has_critic(config, name):
      loaded[name] = loaded[name].with_critic()
  return loaded


def _load(source: str, mesh: jax.sharding.Mesh | None) -> Policy:
  """A policy in the shards of its mesh; on the host where that is spread."""
  if not spread.is_spread(mesh):
    return load(source, mesh=mesh)
  with jax.default_device(spread.host()):
    return load(source)


def _random(
    config: ml_collections.ConfigDict,
    team: Team,
    book: Factbook,
    name: str,
    position: int,
) -> Policy:
  """A policy from scratch, its tokenizer learned from training places."""
  one = config.policies[name]
  lines = _lines(book, one.tokenizer_share, config.tools.max_chars)
  model = train_sentencepiece(
      lines,
      vocab_size=one.vocab_size,
      special_tokens=compact.compact_tags(team),
  )
  tokenizer = SentencePieceTokenizer(model)
  sizes = placing.random_sizes(one, vocab_size=tokenizer.vocab_size)
  params = jax.jit(_init, static_argnames="config")(
      np.uint32(config.seed), position, config=sizes
  )
  return Policy(
      config=sizes,
      params=params,
      tokenizer=tokenizer,
      chat="compact",
      system="",
  )


def _init(
    seed: np.uint32, position: int, *, config: TransformerConfig
) -> Params:
  """Draws parameters; policies of a run differ by their position."""
  key = jax.random.fold_in(jax.random.key(seed), position)
  return init_params(key, config)


def _lines(book: Factbook, share: float, max_chars: int) -> list[str]:
  """Training places' names, and a share of their questions and passages."""
  train = {p for p, split in book.place_splits.items() if split == "train"}
  random = np.random.default_rng(0)
  lines = list(factbook.training_names(book))
  for task in book.splits["train"]:
    if random.random() >= share:
      continue
    lines.append(task.question)
    for hop in task.evidence:
      lines += [hop.question, hop.query, hop.answers[0]]
  for passage in book.corpus.passages.values():
    own = passage.id.split("/")[0] in train
    if own and random.random() < share:
      lines += [passage.title, passage.text[:max_chars]]
  return lines
