"""What travels on the arrows between the seven stages.

Host-side records (tasks, trajectories, groups, completions) are frozen
dataclasses; what a device computes with (`Alignment`, `TrainBatch`,
`TrainState`) is a `flax.struct` pytree. No field is optional by convention:
where a value can be absent its type says so.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Literal

import flax.struct
import jax
import numpy as np

NO_PARENT = -1

# What a policy in training is compared with: nothing, the weights it began
# with, or those of a while ago.
Reference = Literal["none", "first", "moving"]


class Status(enum.IntEnum):
  """How an agent call ended."""

  COMPLETED = 0  # it answered
  TRUNCATED = 1  # a budget (turns, tokens, context) ran out
  MALFORMED = 2  # it kept writing turns that do not parse
  FAILED = 3  # infrastructure; never trained on, retried


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
  """One hop of the reasoning that answers a task.

  Attributes:
    page: id of the passage that holds the answer, `place/section#field`.
    question: the sub-question a main agent would delegate.
    query: what an expert would search for.
    answers: accepted answers; the first one is copied verbatim from the page.
  """

  page: str
  question: str
  query: str
  answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One question with its reference answers.

  Attributes:
    id: unique within the data set; safe as a path component.
    question: what the root role is asked.
    answers: accepted answers, the canonical one first.
    stage: difficulty, `easy` or `hard`.
    hops: number of look-ups the question needs.
    evidence: the look-ups, in order.
    meta: anything else worth keeping beside the task (kind, places).
  """

  id: str
  question: str
  answers: tuple[str, ...]
  stage: str
  hops: int
  evidence: tuple[Evidence, ...]
  meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """One turn of an agent call: what it wrote and what came back.

  Attributes:
    kind: what the turn was understood as.
    name: the tool or child role addressed, empty for answers and malformed.
    argument: the argument text (JSON where the protocol carries JSON).
    result: what was appended to the stream; empty after an answer.
    page: id of the passage that a `visit` opened, else empty.
  """

  kind: Literal["tool", "call", "answer", "malformed"]
  name: str
  argument: str
  result: str
  page: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What the sampler returns for one turn; n sampled tokens.

  Attributes:
    tokens: [n] int32; the stop token, where one was sampled, is the last.
    logprobs: [n] float32, nats, under the distribution sampled from.
    raw_logprobs: [n] float32, nats, under the softmax of the logits, which is
      temperature 1 and nothing filtered; None where the sampler cannot tell.
    finish: `stop` token, `length` of the turn, or `context` exhausted.
    version_min: oldest policy version that sampled a token.
    version_max: newest policy version that sampled a token.
  """

  tokens: np.ndarray
  logprobs: np.ndarray
  raw_logprobs: np.ndarray | None
  finish: Literal["stop", "length", "context"]
  version_min: int
  version_max: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
  """What another job tells of a call whose tokens it keeps.

  Attributes:
    sampled: tokens.
    turns: of the call.
    format: whether its format is valid.
    correct: its own correctness, 0 or 1; None if the judge failed.
    expert: grade of the call itself, 0..1; None if the judge failed.
    overlong: how deep it went into the end of its context, 0..1.
  """

  sampled: int
  turns: int
  format: bool
  correct: float | None
  expert: float | None
  overlong: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
  """The token stream of one agent call, T tokens.

  Tokens before the first sampled one are the prompt; later tokens with loss
  mask 0 are results of tools and child calls.

  Attributes:
    task_id: the task.
    rollout: index of the execution within the task's group, 0..K-1.
    role: name of the role that was called.
    call: ordinal among this role's calls in this rollout.
    parent: position of the caller in the rollout's list, root NO_PARENT.
    request: what the caller asked for; the question, for the root.
    tokens: [T] int32.
    loss_mask: [T] float32, 1 on sampled tokens.
    sampler_logprobs: [T] float32, nats, 0 where the mask is 0.
    version_min: oldest policy version in the stream.
    version_max: newest policy version in the stream.
    status: how it ended.
    turns: the turns in order.
    result_text: what the caller gets; empty where there is none.
    seconds: wall time from call to return.
    attempt: which of several attempts at the same sub-task, from 0; the caller
      saw the first.
    account: None for a call made here; of one that another job made, what that
      job tells of it: its tokens and turns are not here.
  """

  task_id: str
  rollout: int
  role: str
  call: int
  parent: int
  request: str
  tokens: np.ndarray = dataclasses.field(repr=False)
  loss_mask: np.ndarray = dataclasses.field(repr=False)
  sampler_logprobs: np.ndarray = dataclasses.field(repr=False)
  version_min: int
  version_max: int
  status: Status
  turns: tuple[Turn, ...]
  result_text: str
  seconds: float
  attempt: int = 0
  account: Account | None = None

  @property
  def sampled(self) -> int:
    """Tokens that were sampled, here or elsewhere."""
    if self.account is not None:
      return self.account.sampled
    return int(self.loss_mask.sum())

  @property
  def num_turns(self) -> int:
    """Turns that were taken, here or elsewhere."""
    return len(self.turns) if self.account is None else self.account.turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seating:
  """Which of the rollouts begun make a group of K; see `spares`.

  Attributes:
    origin: K numbers: as which rollout each was begun, so with which seeds.
    rescued: how many stand in for one that a machine failed on.
    late: how many stand in for one that was not done in time.
    surplus: rollouts that were begun and are not in the group.
  """

  origin: tuple[int, ...]
  rescued: int
  late: int
  surplus: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutGroup:
  """The K trees of a task, flattened; M trajectories in all.

  Trajectories are ordered by rollout, and within a rollout by the moment of
  the call (parents before children), so a rollout's root comes first.

  Attributes:
    task: the task.
    num_rollouts: K.
    trajectories: M records.
    rollout: [M] int32, 0..K-1.
    parent: [M] int32, position in `trajectories`; NO_PARENT for roots.
    role: [M] int32, position in the team's tuple of roles; the root role is 0.
    call: [M] int32, ordinal among the role's calls in its rollout.
    seating: None where only K rollouts were begun.
  """

  task: Task
  num_rollouts: int
  trajectories: tuple[Trajectory, ...]
  rollout: np.ndarray
  parent: np.ndarray
  role: np.ndarray
  call: np.ndarray
  seating: Seating | None = None


@flax.struct.dataclass
class Alignment:
  """A variable number of calls laid into D slots; B tasks, K rollouts."""

  index: jax.Array  # [B, K, D] int32, which call stands in the slot
  weight: jax.Array  # [B, K, D] float32, 0 on empty slots
  num_calls: jax.Array  # [B, K] int32, before alignment


@flax.struct.dataclass
class Prediction:
  """What a policy says of tokens; [N, T] in packed rows, [M, L] unpacked."""

  logprobs: jax.Array  # float32, nats, of each token given its past
  entropy: Any = None  # float32, nats, of what it was drawn from; if asked for
  values: Any = None  # float32, expected reward before it; of a critic


@flax.struct.dataclass
class TrainBatch:
  """One micro-batch: N packed rows of T tokens, M trajectories of L tokens.

  The model runs on the packed rows. Log-probs are then gathered into the
  padded [M, L] layout, where every loss function acts: element (m, l) stands
  at packed position (row[m], offset[m] + l). Unused trajectories have weight
  0 and mask 0.

  Trajectories that begin alike may have the first P tokens of a row in common,
  as a segment of its own. Each goes on in a segment that sees it: elements
  (m, l) from l = P on stand where the rule above says, those before are masked.
  """

  tokens: jax.Array  # [N, T] int32
  segment_ids: jax.Array  # [N, T] int32, 0 is padding
  positions: jax.Array  # [N, T] int32, in the trajectory
  sampled: jax.Array  # [N, T] bool, where a sampled token stands
  row: jax.Array  # [M] int32
  offset: jax.Array  # [M] int32
  loss_mask: jax.Array  # [M, L] float32, 1 on sampled tokens
  context_mask: jax.Array  # [M, L] float32, 1 on the other predicted tokens
  sampler_logprobs: jax.Array  # [M, L] float32, nats
  old_logprobs: jax.Array  # [M, L] float32, nats
  ref_logprobs: jax.Array  # [M, L] float32, nats
  old_values: jax.Array  # [M, L] float32, a critic's; 0 without one
  advantage: jax.Array  # [M] float32
  weight: jax.Array  # [M] float32
  # [N, T] int32, the segment that a token sees besides its own, 0 for none;
  # None where rows share nothing.
  prefix_ids: Any = None


@flax.struct.dataclass
class TrainState:
  """A policy in training."""

  params: Any  # pytree of float32
  opt_state: Any  # optax state
  step: jax.Array  # [] int32, updates applied
  rng: jax.Array  # PRNG key
  reference: Any = None  # like params, of a reference that moves


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyVersion:
  """A published version of a policy's weights.

  Attributes:
    policy: the policy's name.
    number: counts up from 0 with every publication.
    path: where in the store it lies, relative to the bucket.
    digest: sha256 over the manifest, hexadecimal.
  """

  policy: str
  number: int
  path: str
  digest: str
