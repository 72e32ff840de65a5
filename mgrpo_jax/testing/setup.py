"""A whole run in miniature: tiny policies, a small corpus, a few steps."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

import jax
import numpy as np

from mgrpo_jax import (
    advantages,
    alignment,
    answers,
    importance,
    losses,
    objectives,
    optim,
    packing,
    rewards,
    rollout,
)
from mgrpo_jax.agents import expert, symbolic
from mgrpo_jax.agents.actor import Actor, Moment, sampled
from mgrpo_jax.agents.chat import Chat
from mgrpo_jax.agents.compact import COMPACT
from mgrpo_jax.agents.protocol import Action
from mgrpo_jax.agents.team import Team
from mgrpo_jax.comparison import alike
from mgrpo_jax.plan import Adaptation, Method, Sampler, Setup
from mgrpo_jax.policy.config import TransformerConfig
from mgrpo_jax.policy.params import Params
from mgrpo_jax.policy.params import init as init_params
from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.sampler.interface import RolloutEngine
from mgrpo_jax.sharding import Meshes
from mgrpo_jax.spares import Spares
from mgrpo_jax.tasks.curriculum import Stage
from mgrpo_jax.testing import corpus
from mgrpo_jax.testing import team as team_lib
from mgrpo_jax.testing.sizes import tiny_config
from mgrpo_jax.types import Evidence, RolloutGroup, Task, Trajectory
from mgrpo_jax.work import Budget

CONTEXT = 160


_SAMPLER = Sampler(
    engine={
        "num_slots": 18,
        "context": CONTEXT,
        "block": 32,
        "prefill_tokens": 128,
        "prefill_buckets": (32, 64),
        "decode_steps": 8,
        "decode_rows": 0,
    },
    temperature=1.0,
    evaluation_temperature=0.0,
    turn_deadline=60.0,
    max_attempts=2,
    max_concurrent=9,
    watchdog=30.0,
    deadline=600.0,
    spares=Spares(count=0, patience=0.0),
)


def tasks() -> tuple[Task, ...]:
  """A question for every passage of the small corpus."""
  made = []
  for passage in corpus.passages():
    place, field = passage.title.split(": ")
    name = passage.text.split(";")[0]
    hop = Evidence(
        page=passage.id,
        question=f"{field} of {place}",
        query=f"{place} {field}",
        answers=(name,),
    )
    made.append(
        Task(
            id=passage.id.replace("/", "-").replace("#", "-"),
            question=f"{field} of {place}?",
            answers=(name,),
            stage="easy",
            hops=1,
            evidence=(hop,),
            meta={"kind": "1hop", "family": field},
        )
    )
  return tuple(made)


def small_setup(
    *,
    seed: int,
    imitation_steps: int,
    steps: int,
    team: Team | None = None,
    method: Method | None = None,
    checkpoint_every: int = 2,
    sizes: Mapping[str, Mapping[str, Any]] | None = None,
    meshes: Mapping[str, Meshes] | None = None,
    adaptations: Mapping[str, Adaptation] | None = None,
    codes: Mapping[str, Callable[[Moment], Action]] | None = None,
    external: Mapping[str, Callable[[Policy], RolloutEngine]] | None = None,
) -> Setup:
  """A run of two tiny policies from scratch.

  Args:
    seed: of everything random.
    imitation_steps: steps of the first stage.
    steps: steps of the second stage, which reinforces.
    team: the roles; main and researcher if None.
    method: the algorithm; `small_method` if None.
    checkpoint_every: steps.
    sizes: by policy, fields of its transformer that differ from the tiny one.
    meshes: by policy, where it lives; the default device if None.
    adaptations: by policy, the adapter that is trained in place of it.
    codes: by policy, the plain code that it is; the others have weights.
    external: by policy, makes the engine of one that a server samples.

  Returns:
    The setup.
  """
  roles = team or team_lib.small_team(
      max_context=CONTEXT, max_new_tokens=24, max_turns=3
  )
  chat = team_lib.chat_of(COMPACT, roles)
  coded = {
      name: symbolic.actor(code, chat=chat, protocol=COMPACT)
      for name, code in (codes or {}).items()
  }
  weighted = [name for name in roles.policies if name not in coded]

  stages = _stages(weighted, imitation_steps, steps)
  questions = tasks()
  demonstrate = _demonstrator(roles, dict.fromkeys(weighted, chat), coded)
  return Setup(
      seed=seed,
      stages=stages,
      budget=Budget(trained_tokens=0, generated_tokens=0),
      tasks={stage.name: questions for stage in stages},
      dev=questions[:2],
      test=questions[2:5],
      tasks_per_step=3,
      resample=0,
      max_retries=3,
      max_staleness=0,
      rollouts_per_task=3,
      team=roles,
      policies={
          name: _policy(roles, number, **(sizes or {}).get(name, {}))
          for number, name in enumerate(weighted)
      },
      adaptations=adaptations or {},
      meshes=meshes
      or dict.fromkeys(weighted, Meshes(learner=None, sampler=None)),
      external=external or {},
      actor=functools.partial(_actor, chat),
      coded=coded,
      tools=team_lib.small_tools(max_chars=40),
      demonstrate={stage.name: demonstrate for stage in stages},
      method=method or small_method(roles),
      sampler=_SAMPLER,
      evaluate_every=3,
      checkpoint_every=checkpoint_every,
      keep_checkpoints=2,
      publish_every=1,
      keep_versions=2,
      publish_short=False,
      whole_every=1,
  )


def small_method(team: Team) -> Method:
  """M-GRPO with rewards that even an untrained policy earns some of."""
  share = rewards.RewardWeights(
      format=0.1, correct=0.4, expert=0.5, overlong=0.0
  )
  return Method(
      rules=rewards.Rules(
          format=anything,
          correct=answers.matches,
          expert=evenness,
          correct_of=rewards.of_root,
          overlong=None,
      ),
      reward_weights={role.name: share for role in team.roles},
      align=alignment.duplicate_or_drop,
      num_slots=2,
      comparison=alike(advantages.per_task),
      policy_loss=objectives.PolicyLoss(
          ratio=losses.token_ratio,
          aggregation=losses.sequence_mean_token_mean,
          clip_low=0.2,
          clip_high=0.2,
          kl=losses.kl_k3,
          kl_coefficient=0.01,
          importance=importance.by_token,
          importance_cap=2.0,
          surrogate=losses.clipped_surrogate,
          entropy_coefficient=0.0,
          critic=None,
      ),
      imitation_loss=objectives.ImitationLoss(context_weight=0.1),
      minibatches=2,
      shape=packing.BatchShape(
          rows=4,
          row_tokens=CONTEXT,
          trajectories=16,
          row_targets=CONTEXT,
          least_shared=0,
      ),
      optimizer=optim.AdamW(
          b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0
      ),
      warmup_steps=2,
      reference_every=0,
      stage_rewards={},
  )


def anything(trajectory: Trajectory) -> bool:
  """Accepts every call, so that an untrained team earns rewards."""
  del trajectory
  return True


def evenness(task: Task, trajectory: Trajectory) -> float:
  """Grades a call by the share of even ids among its sampled tokens."""
  del task
  ids = trajectory.tokens[trajectory.loss_mask > 0]
  return float(np.mean(ids % 2 == 0)) if len(ids) else 0.0


def _actor(chat: Chat, name: str, engine: RolloutEngine) -> Actor:
  """Samples from an engine; every policy writes alike."""
  del name
  return sampled(
      engine.generate, release=engine.release, chat=chat, protocol=COMPACT
  )


def _demonstrator(
    team: Team, chats: Mapping[str, Chat], coded: Mapping[str, Actor]
) -> Callable[[Task, int], Coroutine[Any, Any, RolloutGroup]]:
  """Plays the expert, who is never hasty, over the small corpus."""

  async def demonstrate(task: Task, seed: int) -> RolloutGroup:
    environment = expert.environment(
        task,
        team=team,
        chats=chats,
        coded=coded,
        protocol=COMPACT,
        tools=team_lib.small_tools(max_chars=40),
        titles={p.id: p.title for p in corpus.passages()},
        hasty=expert.never,
    )
    return await rollout.run_group(
        task, environment=environment, num_rollouts=1, seed=seed
    )

  return demonstrate


def _stages(
    policies: Collection[str], imitation_steps: int, steps: int
) -> tuple[Stage, Stage]:
  """Imitation, then reinforcement of every policy."""
  imitate = Stage(
      name="imitate",
      objective="imitate",
      steps=imitation_steps,
      families=(),
      trained=frozenset(policies),
      learning_rate=3e-3,
      final_fraction=1.0,
  )
  reinforce = dataclasses.replace(
      imitate, name="reinforce", objective="reinforce", steps=steps
  )
  return imitate, reinforce


def _policy(team: Team, number: int, **changes: Any) -> Policy:
  """A transformer of a few thousand parameters."""
  tokenizer = team_lib.tokenizer(team)
  config = tiny_config(
      **{"vocab_size": tokenizer.vocab_size, "mlp_dim": 32} | changes
  )
  return Policy(
      config=config,
      params=_init(number, config=config),
      tokenizer=tokenizer,
      chat="compact",
      system="",
  )


@functools.partial(jax.jit, static_argnames="config")
def _init(number: int, *, config: TransformerConfig) -> Params:
  """Parameters of the policy of that number."""
  return init_params(jax.random.key(number), config)
