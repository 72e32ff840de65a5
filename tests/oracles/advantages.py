"""Group-relative advantages written from the paper (Eq. 9–13), in loops."""

import numpy as np


def _slots(rewards, weights, places):
  return [(p, rewards[p], weights[p]) for p in places if weights[p] > 0]


def _mean(members):
  return sum(w * r for _, r, w in members) / sum(w for _, _, w in members)


def _standardise(rewards, weights, groups):
  result = np.zeros(rewards.shape)
  for places in groups:
    members = _slots(rewards, weights, places)
    if len({r for _, r, _ in members}) < 2:
      continue
    mean = _mean(members)
    total = sum(w for _, _, w in members)
    variance = sum(w * (r - mean) ** 2 for _, r, w in members) / total
    for place, reward, _ in members:
      result[place] = (reward - mean) / np.sqrt(variance)
  return result


def _tasks(shape):
  b, k, d = shape
  return [[(i, j, n) for j in range(k) for n in range(d)] for i in range(b)]


def per_task(rewards, weights):
  return _standardise(rewards, weights, _tasks(rewards.shape))


def per_call_index(rewards, weights):
  b, k, d = rewards.shape
  groups = [[(i, j, n) for j in range(k)] for i in range(b) for n in range(d)]
  return _standardise(rewards, weights, groups)


def per_batch(rewards, weights):
  return _standardise(rewards, weights, [list(np.ndindex(rewards.shape))])


def per_block(rewards, weights):
  b, k, d = rewards.shape
  queue = []
  for rollout in range(k):
    for task in range(b):
      for slot in range(d):
        if weights[task, rollout, slot] > 0:
          queue.append((task, rollout, slot))
  blocks = [queue[i : i + k] for i in range(0, len(queue), k)]
  return _standardise(rewards, weights, blocks)


def mean_only(rewards, weights):
  result = np.zeros(rewards.shape)
  for places in _tasks(rewards.shape):
    members = _slots(rewards, weights, places)
    for place, reward, _ in members:
      result[place] = reward - _mean(members)
  return result


def leave_one_out(rewards, weights):
  result = np.zeros(rewards.shape)
  for places in _tasks(rewards.shape):
    members = _slots(rewards, weights, places)
    for place, reward, _ in members:
      others = [m for m in members if m[0] != place]
      if others:
        result[place] = reward - _mean(others)
  return result


def other_rollouts(rewards, weights):
  result = np.zeros(rewards.shape)
  for places in _tasks(rewards.shape):
    members = _slots(rewards, weights, places)
    for place, reward, _ in members:
      others = [m for m in members if m[0][1] != place[1]]
      if others:
        result[place] = reward - _mean(others)
  return result


def per_subtask(rewards, weights, subtasks):
  b, k, d = rewards.shape
  groups = [
      [(i, j, n) for n in range(d) if subtasks[i, j, n] == subtask]
      for i in range(b)
      for j in range(k)
      for subtask in set(subtasks[i, j])
  ]
  return _standardise(rewards, weights, groups)


def inherit_parent(parents, weights):
  result = np.zeros(weights.shape)
  for place in np.ndindex(weights.shape):
    if weights[place] > 0:
      result[place] = parents[place[0], place[1], 0]
  return result


def plain(rewards, weights):
  result = np.zeros(rewards.shape)
  for places in _tasks(rewards.shape):
    for place, reward, _ in _slots(rewards, weights, places):
      result[place] = reward
  return result
