"""Estimators of the team's gradient against sums over all that can happen."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from team_game import (
    BEYOND,
    DUPLICATE,
    EXPERT,
    FAINT,
    FLOAT32,
    FLOAT64,
    INVERSE,
    LAW,
    MAIN,
    MASK,
    PAPER,
    STRATEGIES,
    TEAM,
    TWICE,
    calls_of,
    chance_of,
    differentiate,
    exactly,
    jitted,
    listed,
    own,
    policies,
    small,
    true,
    weights_of,
)
from trajectories import group, task, trajectory

from experiments.bench import estimated, gradient_tables, gradients
from experiments.method import ALIGNMENTS, COMPARISONS
from mgrpo_jax import advantages, rewards
from mgrpo_jax.testing import batches, estimators, game


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("max_calls", [2, 4])
def test_every_outcome_is_listed_once(max_calls):
  rules, every = small(max_calls)
  rows = np.column_stack(
      [
          every.requests,
          every.reports.reshape(len(every.correct), -1),
          every.correct,
      ]
  )
  assert len(rows) == 2 * sum(3**d for d in range(max_calls + 1))
  assert len(np.unique(rows, axis=0)) == len(rows)
  law = np.full(max_calls + 1, 1 / (max_calls + 1))
  found = jitted(game.probabilities)(policies(law), rules, every)
  assert (found > 0).all()
  np.testing.assert_allclose(found.sum(1), 1.0, **FLOAT64)


def test_bad_sizes_are_named():
  with pytest.raises(ValueError, match="num_reports must be >= 1, got 0"):
    game.outcomes(max_calls=1, num_reports=0, attempts=1)


@pytest.mark.parametrize("attempts", [1, 2])
def test_rewards_are_the_librarys(attempts):
  rules, every = small(2, attempts)
  trajectories = []
  for k, (d, said, right) in enumerate(
      zip(every.requests, every.reports, every.correct, strict=True)
  ):
    root = len(trajectories)
    text = "Lima" if right else "Rome"
    trajectories.append(trajectory(rollout=k, result_text=text))
    trajectories += [
        trajectory(
            rollout=k,
            role="researcher",
            call=n,
            parent=root,
            request=str(r),
            attempt=n % attempts,
        )
        for n, r in enumerate(said[:d].ravel())
    ]
  scores = rewards.score(
      whole := group(task(), trajectories, len(every.requests)),
      weights={"main": MAIN, "researcher": PAPER},
      rules=rewards.Rules(
          format=lambda t: not t.request or rules.valid[int(t.request)] > 0,
          correct=lambda text, accepted: text in accepted,
          expert=lambda _, t: float(rules.expert[int(t.request)]),
          correct_of=rewards.of_root,
          overlong=None,
      ),
  )
  sizes = {"main": 1, "researcher": 2 * attempts}
  expected = rewards.by_role([whole], [scores], max_calls=sizes)
  roots = expected["main"].rewards[0, :, 0]
  for role, split in (("main", MAIN), ("researcher", PAPER)):
    found = calls_of(split, attempts=attempts)
    alike = expected[role]
    np.testing.assert_array_equal(found.num_calls, alike.num_calls[0])
    np.testing.assert_array_equal(found.subtasks, alike.subtasks[0])
    np.testing.assert_allclose(found.rewards, alike.rewards[0], rtol=1e-6)
    np.testing.assert_allclose(found.roots, roots, rtol=1e-6)


@pytest.mark.parametrize("split", [MAIN, PAPER])
@pytest.mark.parametrize("align", [MASK, INVERSE])
def test_true_gradients_are_finite_differences(split, align):
  rules, every = small()
  calls = calls_of(split)
  weights = weights_of(calls, align, 3)
  name = "calls" if split is MAIN else "reports"
  found, values = true(split, align=align), getattr(policies(), name)

  def at(place, step):
    moved = values.copy()
    moved[place] += step
    return jitted(game.expected_reward)(
        policies().replace(**{name: moved}),
        game=rules,
        outcomes=every,
        calls=calls,
        call_weights=weights,
    )

  expected = [
      (at(place, 1e-5) - at(place, -1e-5)) / 2e-5
      for place in np.ndindex(values.shape)
  ]
  assert np.abs(found).max() > 1e-2
  np.testing.assert_allclose(found, expected, atol=1e-9)  # step², ulp / step


@pytest.mark.parametrize("align", STRATEGIES)
def test_the_true_gradient_is_own_and_siblings(align):
  calls = jax.device_get(calls_of(PAPER))
  weights = weights_of(calls, align, 3)
  parts, total = np.zeros((2, 6)), 0.0
  for n, chance in enumerate(chance_of().mean(0)):
    d = calls.num_calls[n]
    total += chance * weights[n] * d
    for i, j in itertools.product(range(d), repeat=2):
      term = chance * weights[n] * calls.rewards[n, j] * calls.scores[n, i]
      parts[int(i != j)] += term
  parts /= total
  np.testing.assert_allclose(own(PAPER, align=align), parts[0], **FLOAT64)
  np.testing.assert_allclose(true(PAPER, align=align), parts.sum(0), **FLOAT64)
  assert np.linalg.norm(parts[1]) > 0.05 * np.linalg.norm(parts[0])


def test_only_a_shared_reward_separates_own_from_true():
  np.testing.assert_allclose(own(EXPERT), true(EXPERT), **FLOAT64)


def test_a_call_credited_alone_gets_one_of_d_shares_of_the_teams_reward():
  # d = 2, formats always valid, nothing but main_correct counts.
  rules, every = small()
  rules = rules.replace(valid=np.ones(3))
  calls = jitted(game.sub_calls, weights=TEAM)(
      policies(TWICE), rules, every, roots=every.correct
  )
  chance = chance_of(TWICE).mean(0)
  ones = np.ones(len(chance))
  alone = jitted(game.own_gradient)(chance, calls, ones)
  whole = jitted(jax.grad(game.expected_reward))(
      policies(TWICE),
      game=rules,
      outcomes=every,
      calls=calls,
      call_weights=ones,
  )
  np.testing.assert_allclose(2 * alone, np.ravel(whole.reports), **FLOAT64)


def test_listing_multisets_is_listing_ordered_groups():
  calls, chance = calls_of(PAPER), chance_of()
  pairs = np.array(list(itertools.product(range(chance.shape[1]), repeat=2)))
  # d ≤ D: nothing is drawn.
  aligned = jitted(INVERSE, num_slots=3)(
      jax.random.key(0), calls.num_calls[pairs]
  )
  places = (pairs[..., None], np.asarray(aligned.index))
  every = batches.Slots(
      rewards=calls.rewards[places][:, None],
      weights=aligned.weight[:, None],
      scores=calls.scores[places][:, None],
      subtasks=calls.subtasks[places][:, None],
      roots=calls.roots[pairs][:, None, :, None],
  )
  likely = chance[:, pairs].prod(2).mean(0)
  expected = likely @ differentiate(advantages.per_task, every)
  found = exactly(PAPER, advantages.per_task, rollouts=2)
  np.testing.assert_allclose(found.mean, expected, **FLOAT32)


@pytest.mark.parametrize("slots", [1, 3])  # drops, copies
def test_random_batches_agree_with_the_list(slots):
  number, align = 4000, DUPLICATE
  draw = jitted(
      batches.sample_slots,
      align=align,
      num_batches=number,
      num_tasks=1,
      num_rollouts=3,
      num_slots=slots,
  )
  keys = jax.random.split(jax.random.key(1), 3)
  values = [
      differentiate(
          advantages.per_task,
          draw(keys[0], again, chance_of(), calls_of(PAPER)),
      )
      for again in keys[1:]
  ]
  found = estimators.sampled_moments(*values)
  exact = exactly(PAPER, advantages.per_task, align=align, slots=slots)
  error = np.sqrt(np.diag(exact.covariance) / number)
  # Five standard errors: once in 10^6 tests of six numbers.
  assert (np.abs(found.mean - exact.mean) <= 5 * error).all()
  assert np.trace(found.covariance) == pytest.approx(
      np.trace(exact.covariance), rel=0.1
  )
  assert found.draws == pytest.approx(exact.draws, rel=0.15)


@pytest.mark.parametrize("rollouts", [2, 4, 8])
def test_main_is_unbiased_but_for_its_own_share_of_the_mean(rollouts):
  expected = true(MAIN)
  np.testing.assert_allclose(own(MAIN), expected, **FLOAT64)
  for advantage, scale in (
      (advantages.leave_one_out, 1.0),
      (advantages.mean_only, 1 - 1 / rollouts),
  ):
    found = exactly(MAIN, advantage, rollouts=rollouts, slots=1)
    np.testing.assert_allclose(found.mean, scale * expected, **FLOAT32)


def test_standardising_turns_no_gradient_of_one_binary_reward():
  found = exactly(MAIN, advantages.per_task, rollouts=8, slots=1)
  compared = estimators.compare(found, true(MAIN))
  assert compared.cosine == pytest.approx(1.0, abs=1e-6)
  assert compared.scale > 1.5


@pytest.mark.parametrize("rollouts", [2, 4])
@pytest.mark.parametrize("split", [PAPER, EXPERT])
def test_calls_of_one_rollout_bias_the_pooled_baseline(split, rollouts):
  # d = 2 always: u - T/(2K) and u - (T - u)/(2K - 1), T the true gradient.
  alone, whole = own(split, law=TWICE), true(split, law=TWICE)
  size = 2 * rollouts
  for advantage, expected in (
      (advantages.mean_only, alone - whole / size),
      (advantages.leave_one_out, alone - (whole - alone) / (size - 1)),
  ):
    for align in (MASK, INVERSE):
      found = exactly(
          split, advantage, law=TWICE, align=align, rollouts=rollouts
      )
      np.testing.assert_allclose(found.mean, expected, **FLOAT32)


@pytest.mark.parametrize("align", [DUPLICATE, INVERSE])
def test_other_rollouts_are_an_unbiased_baseline(align):
  silent = LAW[0]
  some = 1 - silent**3  # P(a rollout of the three has calls)
  two = some - 3 * silent**2 * (1 - silent)
  for advantage, scale in zip(BEYOND, (some, two), strict=True):
    found = exactly(PAPER, advantage, align=align)
    np.testing.assert_allclose(found.mean, scale * own(PAPER), **FLOAT32)


def test_mask_is_the_mean_over_calls_only_in_large_batches():
  gaps = []
  for rollouts in (2, 4):
    moments = exactly(
        EXPERT, advantages.other_rollouts, align=MASK, rollouts=rollouts
    )
    compared = estimators.compare(moments, own(EXPERT, align=MASK))
    gaps.append(1 - compared.cosine)
  assert gaps[0] > 1.8 * gaps[1] > 0
  # Its target is another one: talkative rollouts weigh more.
  per_call, per_rollout = own(EXPERT, align=MASK), own(EXPERT)
  assert np.linalg.norm(per_call - per_rollout) > 0.05 * np.linalg.norm(
      per_rollout
  )


def given_rollouts(advantage, align):
  every = listed(PAPER, LAW, align, 3, 3)
  values = differentiate(advantage, every.slots)
  return estimators.given_rollouts(values, every)[0]


@pytest.mark.parametrize("advantage", BEYOND)
def test_copies_average_to_inverse_count(advantage):
  found = given_rollouts(advantage, DUPLICATE)
  expected = given_rollouts(advantage, INVERSE)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def within_rollouts():
  """Slots by inverse_count, and n, d [G, K] and share of each slot's call."""
  slots = jax.device_get(listed(PAPER, LAW, INVERSE, 3, 3).slots)
  shares = np.float64(slots.weights[:, 0])
  d = (shares > 0).sum(2)
  n = np.maximum((d > 0).sum(1, keepdims=True), 1)
  return slots.rewards[:, 0], slots.scores[:, 0], shares, d, n


def test_copies_pull_the_pooled_mean_by_a_covariance():
  # -Σ_k (D - d)/(nD)² cov_k(∇ log π, R), over the calls of rollout k.
  earned, scores, shares, d, n = within_rollouts()
  means = (shares * earned).sum(2)
  products = np.einsum("gkd,gkd,gkdp->gkp", shares, earned, scores)
  apart = products - means[..., None] * np.einsum(
      "gkd,gkdp->gkp", shares, scores
  )
  pull = np.where(d > 0, (3 - d) / (3 * n) ** 2, 0.0)
  expected = -np.einsum("gk,gkp->gp", pull, apart)
  found = given_rollouts(advantages.mean_only, DUPLICATE) - given_rollouts(
      advantages.mean_only, INVERSE
  )
  assert np.abs(expected).max() > 1e-2
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "advantage",
    [
        advantages.leave_one_out,
        advantages.per_task,
        advantages.per_call_index,
    ],
)
def test_copies_do_not_average_to_inverse_count_elsewhere(advantage):
  expected = given_rollouts(advantage, INVERSE)
  gap = given_rollouts(advantage, DUPLICATE) - expected
  assert np.abs(gap).max() > 0.02 * np.abs(expected).max()


def test_the_variance_that_copies_add():
  # E Σ_k (D - d)/(nD)² tr cov_k(R ∇ log π), where advantages are fixed.
  earned, scores, shares, d, n = within_rollouts()
  terms = earned[..., None] * scores
  centre = np.einsum("gkd,gkdp->gkp", shares, terms)
  scatter = np.einsum("gkd,gkdp->gk", shares, terms**2) - (centre**2).sum(2)
  removed = np.where(d > 0, (3 - d) / (3 * n) ** 2, 0.0) * scatter
  expected = listed(PAPER, LAW, INVERSE, 3, 3).chance @ removed.sum(1)
  copies = exactly(PAPER, advantages.plain, align=DUPLICATE)
  weights = exactly(PAPER, advantages.plain, align=INVERSE)
  assert expected > 0
  assert copies.draws == pytest.approx(expected, rel=1e-5)
  assert weights.draws == pytest.approx(0, abs=1e-12)
  more = np.trace(copies.covariance) - np.trace(weights.covariance)
  assert more == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "advantage",
    [
        advantages.mean_only,
        advantages.per_task,
        advantages.other_rollouts,
    ],
)
def test_inverse_count_is_the_less_noisy_one(advantage):
  noise = [
      estimators.compare(
          exactly(PAPER, advantage, align=align), own(PAPER)
      ).noise
      for align in (INVERSE, DUPLICATE)
  ]
  assert noise[1] > 1.02 * noise[0]


def test_dropping_is_the_same_to_both():
  found, expected = (
      exactly(PAPER, advantages.per_task, align=align, slots=1)
      for align in (DUPLICATE, INVERSE)
  )
  np.testing.assert_allclose(found.mean, expected.mean, **FLOAT32)
  assert found.draws == pytest.approx(expected.draws) and found.draws > 0


def test_a_block_of_one_task_is_a_task():
  found, expected = (
      exactly(PAPER, advantage)
      for advantage in (advantages.per_batch, advantages.per_task)
  )
  np.testing.assert_array_equal(found.mean, expected.mean)


def test_standardising_magnifies_a_faint_grade():
  # What a grade of weight 0.01 adds to the mean gradient, per unit of scale.
  added = []
  for advantage in (advantages.mean_only, advantages.per_task):
    without, faint = (exactly(split, advantage) for split in (TEAM, FAINT))
    scale = estimators.compare(without, own(TEAM)).scale
    added.append(np.linalg.norm(faint.mean - without.mean) / scale)
  assert added[0] < 0.02 * np.linalg.norm(own(EXPERT))
  assert added[1] > 10 * added[0]


def test_the_command_measures_what_it_says():
  case = dataclasses.replace(gradients.SUB, rollouts=3)
  draws = estimated.Draws(batches=1, seed=0)
  rows = list(estimated.measure(case, draws))
  assert {(r["alignment"], r["normaliser"]) for r in rows} == {
      (align.__name__, name)
      for align in STRATEGIES
      for name in set(COMPARISONS) - {"per_batch", "per_block", "per_subtask"}
  }
  for row in estimated.measure_copies(case):
    exact = row["normaliser"] in ("plain", "other_rollouts", "inherit_parent")
    assert (row["gap"] < 1e-5) == exact
  (row,) = (
      r
      for r in rows
      if (r["alignment"], r["normaliser"]) == ("inverse_count", "mean_only")
  )
  expected = estimators.compare(
      exactly(PAPER, advantages.mean_only), own(PAPER)
  )
  for name, value in dataclasses.asdict(expected).items():
    assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6)
  with pytest.raises(ValueError, match="--rollouts must be numbers >= 2"):
    gradients._positive(["4", "1"])


def test_every_comparison_is_measured_with_every_split_slots_and_spread():
  found = {}
  for cases in gradients._parts([2, 4, 8]).values():
    for case in cases:
      for name in case.normalisers if case.role == "sub" else ():
        for axis in ("rollouts", "slots", "law"):
          seen = found.setdefault((name, case.split, axis), set())
          seen.add(getattr(case, axis))
  for name in COMPARISONS:
    for split in gradients.CROSSED:
      for axis in ("slots", "law"):
        assert len(found[name, split, axis]) >= 3
    assert found[name, "paper", "rollouts"] == {
        "per_batch": {8},  # not of one task: it is `per_task` there
    }.get(name, {2, 4, 8})


def test_what_is_recorded_is_what_would_be_measured():
  fields = [field.name for field in dataclasses.fields(gradients.Case)]
  recorded = gradient_tables.read("experiments/results/gradients.json")
  found = [
      (
          row["table"],
          *(row[name] for name in fields),
          row["alignment"],
          row["normaliser"],
      )
      for row in recorded
  ]
  planned = [
      (title, *dataclasses.astuple(case), alignment, normaliser)
      for title, cases in gradients._parts([2, 4, 8]).items()
      for case in cases
      for alignment in (ALIGNMENTS if case.role == "sub" else [""])
      for normaliser in case.normalisers
  ] + [
      (gradients.COPIES, *dataclasses.astuple(case), None, normaliser)
      for case in gradients._copied([2, 4, 8])
      for normaliser in case.normalisers
  ]
  assert sorted(found, key=str) == sorted(planned, key=str)


def test_what_was_measured_is_read_again(tmp_path):
  case = dataclasses.replace(gradients.SUB, role="main", split="", slots=1)
  draws = estimated.Draws(batches=1, seed=0)
  rows = [{"table": "Main", **row} for row in estimated.measure(case, draws)]
  gradient_tables.write(tmp_path / "file", rows, setup={"seed": 0})
  again = gradient_tables.read(tmp_path / "file")
  assert gradient_tables.markdown(again) == gradient_tables.markdown(rows)
  whole = json.loads((tmp_path / "file").read_text())
  row = whole["tables"]["Main"][0]
  for tables in (None, [], {"x": None}, {"x": []}, {"x": [row[1:]]}):
    damaged = json.dumps(whole | {"tables": tables})
    (tmp_path / "file").write_text(damaged)
    with pytest.raises(ValueError, match=r"experiments\.bench\.gradients"):
      gradient_tables.read(tmp_path / "file")
