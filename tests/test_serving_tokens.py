"""Token ids in, token ids out, and weights that a trainer hands over."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest
from served import (
    CHAT,
    CONFIG,
    CONTEXT,
    TOKENIZER,
    engine,
    serve,
    speaker,
    weights,
)

from mgrpo_jax.policy.policy import Policy
from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import handover
from mgrpo_jax.serving.team import team
from mgrpo_jax.serving.weights import Weights
from mgrpo_jax.testing.generate import complete
from mgrpo_jax.testing.team import environment, small_team, tokenizer

ASKED = {
    "temperature": 1.0, "max_tokens": 20, "logprobs": 0, "ignore_eos": True,
    "return_token_ids": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
  """A server of one tiny policy."""
  made = engine()
  with serve(speaker(made.generate), engines={"tiny": made}) as served:
    yield served


def direct(tokens, *, seed, stop_ids=(), params=None):
  """What the engine itself yields."""

  async def run():
    made = engine()
    if params is not None:
      made.update(params, 8)
    async with made:
      sampling = Sampling(temperature=1.0, max_new_tokens=20, stop_ids=stop_ids)
      return await made.generate(tokens, sampling, seed)

  return asyncio.run(run())


@pytest.mark.parametrize("seed", [0, 3, 2**64 - 5, -5])
def test_same_ids_and_logprobs_as_the_engine(tiny, seed):
  told = tiny.continue_tokens(seed=seed, **ASKED)
  expected = direct([1, 2, 3], seed=seed % 2**64)
  (choice,) = told["choices"]
  assert choice["token_ids"] == expected.tokens.tolist()
  assert choice["prompt_token_ids"] == [1, 2, 3]
  logprobs = choice["logprobs"]
  np.testing.assert_array_equal(
      np.float32(logprobs["token_logprobs"]), expected.logprobs
  )
  assert choice["text"] == TOKENIZER.decode(choice["token_ids"])
  assert "".join(logprobs["tokens"])[logprobs["text_offset"][5] :].startswith(
      logprobs["tokens"][5]
  )
  assert choice["finish_reason"] == "length"
  assert choice["policy_versions"] == [7, 7]
  assert told["object"] == "text_completion"
  assert told["usage"] == {
      "prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23,
  }  # fmt: skip


def test_only_the_stop_tokens_asked_for_end_it(tiny):
  free = direct([1, 2, 3], seed=3).tokens.tolist()
  stop = free[6]
  (choice,) = tiny.continue_tokens(seed=3, stop_token_ids=[stop], **ASKED)[
      "choices"
  ]
  cut = free.index(stop) + 1
  assert choice["token_ids"] == free[:cut]
  assert choice["finish_reason"] == "stop"
  assert choice["text"] == TOKENIZER.decode(free[: cut - 1])


def test_the_turns_end_of_the_chat_format_counts_unless_ignored():
  asked = []

  async def generate(tokens, sampling, seed, **_):
    asked.append(sampling.stop_ids)
    return complete([5], sampling, seed=seed, version=1)

  with serve(speaker(generate)) as served:
    served.continue_tokens(ignore_eos=True, stop_token_ids=[9])
    served.continue_tokens(stop_token_ids=[9])
  assert asked == [(9,), (9, *CHAT.stop_ids)]


def test_tokens_are_named_by_ids_where_that_is_wanted(tiny):
  asked = ASKED | {"return_token_ids": False}
  told = tiny.continue_tokens(return_tokens_as_token_ids=True, **asked)
  (choice,) = told["choices"]
  assert "token_ids" not in choice
  for name, top in zip(
      choice["logprobs"]["tokens"],
      choice["logprobs"]["top_logprobs"],
      strict=True,
  ):
    assert name.startswith("token_id:") and list(top) == [name]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "Hello"}, "prompt"),
        ({"prompt": ["Hello"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [1] * CONTEXT}, "prompt"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(9))}, "stop_token_ids"),
        # with those that end a turn more than the engine takes
        ({"stop_token_ids": list(range(20, 28))}, "stop_token_ids"),
        ({"logprobs": False}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"stream": True}, "stream"),
        ({"top_k": 5}, "top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1e-9}, "temperature"),
        ({"best": 1}, "best"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tiny, fields, param):
  error = tiny.continue_tokens(400, **fields)["error"]
  assert error["param"] == param and param in error["message"]


def test_a_team_has_no_tokens():
  async def never(*args, **kwargs):
    raise AssertionError

  roles = small_team()
  world = environment({"main": never, "researcher": never}, team=roles)
  model = team("team", environment=world, tokenizer=tokenizer(roles))
  with serve(models=[model]) as served:
    error = served.continue_tokens(400, model="team")["error"]
    assert error["param"] == "model"


def policy(params, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  return Policy(
      config=config, params=params, tokenizer=None, chat=None, system=""
  )


@pytest.fixture
def renewed(tmp_path):
  """A server that loads weights from a folder, and other weights in it."""
  made = engine()
  others = jax.tree.map(lambda x: x[..., ::-1].copy(), weights())
  handover.write(tmp_path / "tiny", 8, policy(others))
  loading = Weights(tmp_path, engines={"tiny": made}, configs={"tiny": CONFIG})
  with serve(
      speaker(made.generate), engines={"tiny": made}, weights=loading
  ) as served:
    yield served, others


def load(served, name="tiny", **fields):
  status, _, answer = served.ask("POST", f"/v1/weights/{name}", fields)
  return status, answer.decode()


def label(served):
  return served.ask("GET", "/v1/weights/tiny")[2].decode()


def test_weights_are_loaded_by_version(renewed):
  served, others = renewed
  assert label(served) == '{"label":""}'
  assert load(served, version=8, label="mine") == (200, '{"label":"mine"}')
  assert label(served) == '{"label":"mine"}'
  (choice,) = served.continue_tokens(seed=3, **ASKED)["choices"]
  expected = direct([1, 2, 3], seed=3, params=others)
  assert choice["token_ids"] == expected.tokens.tolist()
  assert choice["policy_versions"] == [8, 8]
  assert expected.tokens.tolist() != direct([1, 2, 3], seed=3).tokens.tolist()


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"version": 9, "label": "mine"}, 409),  # not there
        ({"version": -1, "label": "mine"}, 400),
        ({"label": "mine"}, 400),
        ({"version": 8, "label": "m" * 65}, 400),
        ({"version": 8}, 400),
        ({"version": 8, "label": "mine", "path": "/etc"}, 400),
        ({"version": 8, "label": "mine", "name": "other"}, 404),
        ({"version": 8, "label": "mine", "name": "..%2Ftiny"}, 404),
    ],
)
def test_other_weights_are_refused_and_nothing_changes(renewed, fields, status):
  served, _ = renewed
  found, told = load(served, **fields)
  assert found == status, told
  assert label(served) == '{"label":""}'


def test_weights_of_another_model_are_refused(renewed, tmp_path):
  served, others = renewed
  handover.write(tmp_path / "tiny", 9, policy(others, rope_base=7.0))
  status, told = load(served, version=9, label="mine")
  assert status == 409 and "another model" in told


def test_without_a_folder_nobody_loads_weights(tiny):
  assert tiny.ask("GET", "/v1/weights/tiny")[0] == 404
