"""One update is the same however its trajectories are laid out or sharded.

Micro-batches of one, some and all trajectories; packed and padded; any order;
one device and eight. For objectives in which all parts meet in pairs, all
in one program, so that each layout compiles once.
"""

import dataclasses
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from many_objectives import (
    OBJECTIVES,
    POLICY_LOSSES,
    accumulate_each,
    columns,
    extras,
    jit,
)
from trajectories import begun_alike, random_credits

from mgrpo_jax import optim, packing, prefixes, sharding, update
from mgrpo_jax.policy import logprobs as policy_logprobs
from mgrpo_jax.policy import params as policy_params
from mgrpo_jax.testing.sizes import tiny_config
from mgrpo_jax.types import Prediction, TrainState

VOCAB = 11
# An eps that is not tiny: Adam divides by the root of the second moment, and
# a gradient that is nothing but rounding would become a full step.
OPTIMIZER = optim.adamw(
    optim.AdamW(b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.01, clip_norm=0.7)
)
RATE = np.float32(0.1)
CREDITS = random_credits(
    [7, 16, 3, 9, 12, 5, 5, 10, 2, 14], vocab_size=VOCAB, weights=(0.5, 1, 2)
)
CONFIG = tiny_config(
    vocab_size=VOCAB,
    num_layers=1,
    mlp_dim=16,
    tied_embeddings=False,
    value_head=True,
)


def mixer(params, tokens, positions, segment_ids, *, wanted, prefix_ids):
  """Predicts from all the past of the segment, each place in its own way.

  It would see any confusion of segments or positions, and compiles faster
  than a transformer.
  """
  length = tokens.shape[1]
  same = segment_ids[:, :, None] == segment_ids[:, None]
  if prefix_ids is not None:
    seen = prefix_ids[:, :, None]
    same |= (seen == segment_ids[:, None]) & (seen > 0)
  past = same & np.tri(length, dtype=bool)[None]
  embedded = params["embed"][tokens] * jnp.cos(positions[..., None] / 3.0)
  hidden = jnp.tanh(past.astype(jnp.float32) @ embedded)[:, :-1]
  logits = jax.nn.log_softmax(hidden @ params["table"])
  said = Prediction(
      logprobs=jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0],
      entropy=-jnp.sum(jnp.exp(logits) * logits, axis=2),
      values=hidden @ params["value"],
  )
  return jax.tree.map(
      lambda x: jnp.pad(
          jnp.where(positions[:, 1:] > 0, x, 0.0), ((0, 0), (1, 0))
      ),
      said,
  )


transformer = functools.partial(
    policy_logprobs.predict, config=CONFIG, temperature=1.0, entropy=True
)


@functools.cache
def mixer_params():
  rng = np.random.default_rng(4)
  return {
      "embed": np.float32(rng.normal(size=(VOCAB, VOCAB))),
      "table": np.float32(rng.normal(size=(VOCAB, VOCAB))),
      "value": np.float32(rng.normal(size=VOCAB)),
  }


@functools.cache
def transformer_params():
  init = functools.partial(policy_params.init, config=CONFIG)
  params = jax.device_get(jax.jit(init)(jax.random.key(0)))
  # A head that begins at 0 would pass no gradient on.
  head = np.random.default_rng(5).normal(size=params.value_head.shape)
  return dataclasses.replace(params, value_head=np.float32(head))


@functools.cache
def programs(predict_fn):
  """Scores a batch; adds its gradient, to that of every objective.

  The model runs forward once and, for all objectives together, backward once:
  `update.accumulate` differentiates by what is said of packed tokens.
  """

  def accumulate(gradients, params, batch, totals):
    def say(params):
      return predict_fn(
          params,
          batch.tokens,
          batch.positions,
          batch.segment_ids,
          wanted=batch.sampled,
          prefix_ids=batch.prefix_ids,
      )

    said, back = jax.vjp(say, params)
    found = accumulate_each(said, batch, totals)
    slopes = [gradient.grads for gradient, _ in found.values()]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *slopes)
    (grads,) = jax.lax.map(back, stacked)
    tallies = {name: tally for name, (_, tally) in found.items()}
    summed = update.Gradient(
        grads=jax.tree.map(jnp.add, gradients.grads, grads),
        loss=gradients.loss
        + jnp.stack([one.loss for one, _ in found.values()]),
    )
    return summed, tallies

  score = functools.partial(update.score, predict_fn=predict_fn)
  return jit(score), jit(accumulate)


def nothing(params):
  """The gradients of all objectives before any micro-batch."""
  one = update.zeros(params)
  return jax.tree.map(lambda x: jnp.stack([x] * len(OBJECTIVES)), one)


@jit
def applied(params, gradients):
  """One update for each of the objectives' gradients."""
  state = TrainState(
      params=params,
      opt_state=OPTIMIZER.init(params),
      step=np.int32(0),
      rng=np.zeros(2, np.uint32),
  )
  run = functools.partial(update.apply, optimizer=OPTIMIZER)
  after, metrics = jax.lax.map(lambda one: run(state, one, RATE), gradients)
  return after.params, metrics


def scaled(params, factor):
  return jax.tree.map(lambda p: np.float32(p * factor), params)


def updates(params, credits, shape, predict_fn, place=lambda tree: tree):
  """By objective: parameters after one update, and the metrics.

  Old and reference log-probs are those of two other sets of weights, as they
  are where the reference moves.
  """
  score, accumulate = programs(predict_fn)
  put = functools.partial(jax.tree.map, jnp.asarray)
  old, reference = (
      place(put(scaled(params, factor))) for factor in (1.02, 0.97)
  )
  params = place(put(params))
  gradients = jit(nothing)(params)
  tallies = []
  for batch in packing.pack(credits, shape=shape):
    batch = place(batch)
    before = score(old, batch)
    batch = batch.replace(
        old_logprobs=before.logprobs,
        old_values=before.values,
        ref_logprobs=score(reference, batch).logprobs,
    )
    gradients, tally = accumulate(
        gradients, params, batch, packing.count(credits)
    )
    tallies.append(tally)
  after = jax.device_get(applied(params, gradients))
  updated = {}
  for number, name in enumerate(OBJECTIVES):
    params, metrics = jax.tree.map(operator.itemgetter(number), after)
    tally = [one[name] for one in tallies]
    updated[name] = params, update.summarise(tally, [metrics])
  return updated


def assert_same_updates(found, expected, names=tuple(OBJECTIVES)):
  assert found.keys() == expected.keys() == OBJECTIVES.keys()
  for name in names:
    # float32: sums in another order. Steps are RATE long, gradients of norm
    # about 1; 1e-5 is a hundredth of a percent of a step.
    jax.tree.map(
        functools.partial(
            np.testing.assert_allclose, rtol=1e-4, atol=1e-5, err_msg=name
        ),
        jax.device_get(found[name]),
        jax.device_get(expected[name]),
    )


def shape_of(rows, row_tokens, trajectories):
  return packing.BatchShape(
      rows=rows,
      row_tokens=row_tokens,
      trajectories=trajectories,
      row_targets=row_tokens,
      least_shared=0,
  )


WHOLE = shape_of(8, 16, 16)
SHARING = dataclasses.replace(shape_of(8, 32, 16), least_shared=3)
ALIKE = begun_alike(CREDITS, ((6, 0), (8, 0), (7, 9), (9, 9)))


@functools.cache
def reference_updates():
  assert len(packing.pack(CREDITS, shape=WHOLE)) == 1
  return updates(mixer_params(), CREDITS, WHOLE, mixer)


def test_objectives_cover_all_pairs_and_differ():
  rows = [columns(a, b) for a, b in itertools.product(range(4), repeat=2)]
  for one, other in itertools.combinations(zip(*rows, strict=True), 2):
    assert len(set(zip(one, other, strict=True))) == 16
  more = [extras(a, b) for a, b in itertools.product(range(4), repeat=2)]
  entropy, critics = zip(*more, strict=True)
  assert len(set(zip(entropy, critics, strict=True))) == 4
  for one in tuple(zip(*rows, strict=True))[:3]:
    for extra in (entropy, critics):
      assert len(set(zip(one, extra, strict=True))) == 8
  losses_found = []
  for name, (params, metrics) in reference_updates().items():
    assert metrics["nonfinite"] == 0 and metrics["update_norm"] > 0.01
    if name in POLICY_LOSSES:
      assert 0 < metrics["clip_fraction"] < 1, name
    moved = [np.ptp(params[k] - mixer_params()[k]) > 0 for k in params]
    losses_found.append(metrics["loss"])
    assert moved[0] and moved[1]
  assert len(set(losses_found)) == len(OBJECTIVES)


@pytest.mark.parametrize(
    "rows, row_tokens, trajectories, micro_batches",
    [
        (1, 16, 1, 10),  # one trajectory at a time, each padded
        (2, 16, 2, 5),  # two
        (3, 16, 8, 2),  # packed, two micro-batches
        (1, 90, 10, 1),  # packed into one long row
    ],
)
def test_micro_batches_and_packing_do_not_matter(
    rows, row_tokens, trajectories, micro_batches
):
  shape = shape_of(rows, row_tokens, trajectories)
  assert len(packing.pack(CREDITS, shape=shape)) == micro_batches
  found = updates(mixer_params(), CREDITS, shape, mixer)
  assert_same_updates(found, reference_updates())


@pytest.mark.parametrize("seed", range(3))
def test_order_does_not_matter(seed):
  order = np.random.default_rng(seed).permutation(len(CREDITS))
  shuffled = [CREDITS[i] for i in order]
  found = updates(mixer_params(), shuffled, shape_of(3, 16, 8), mixer)
  assert_same_updates(found, reference_updates())


def test_what_rows_share_does_not_matter():
  apart = dataclasses.replace(SHARING, least_shared=0)
  expected = updates(mixer_params(), ALIKE, apart, mixer)
  unread = {n for n, one in OBJECTIVES.items() if not one.reads_context}
  assert OBJECTIVES.keys() - unread == {"imitation_reading"}
  for order in (slice(None), slice(None, None, -1)):
    batches = packing.pack(ALIKE[order], shape=SHARING)
    assert prefixes.shared_fraction(batches) > 0.1
    found = updates(mixer_params(), ALIKE[order], SHARING, mixer)
    assert_same_updates(found, expected, unread)


@pytest.mark.parametrize(
    ("credits", "shape"), ((CREDITS, WHOLE), (ALIKE, SHARING))
)
def test_devices_do_not_matter(credits, shape):
  expected = updates(transformer_params(), credits, shape, transformer)
  mesh = sharding.make_mesh(
      data=2, fsdp=4, tensor=1, expert=1, devices=jax.devices()[:8]
  )
  specs = policy_params.param_specs(CONFIG)
  resting = sharding.params_shardings(specs, mesh)

  def place(tree):
    if isinstance(tree, packing.TrainBatch):
      return jax.device_put(tree, sharding.batch_shardings(tree, mesh))
    return jax.device_put(tree, resting)

  with jax.set_mesh(mesh):
    found = updates(transformer_params(), credits, shape, transformer, place)
  assert_same_updates(found, expected)
