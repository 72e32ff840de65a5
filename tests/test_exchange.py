"""Requests and answers of /v1/completions, as JSON."""

import dataclasses
import json

import numpy as np
import pytest
from fake_openai import VOCAB, honest

from mgrpo_jax.policy.sampling import Sampling
from mgrpo_jax.sampler import exchange
from mgrpo_jax.sampler.exchange import AbortedError, AnswerError, Question


def question(*, stops=(), limit=4, seed=7, temperature=1.0):
  sampling = Sampling(
      temperature=temperature, max_new_tokens=99, stop_ids=stops
  )
  return Question(tokens=(3, 1, 2), sampling=sampling, seed=seed, limit=limit)


def ask(asked, **changes):
  body = exchange.body(asked, "tiny")
  return exchange.read(
      honest(body, **changes), asked, vocab_size=VOCAB, newest=4
  )


def logprobs(*values):
  return {"logprobs": {"token_logprobs": list(values)}}


def test_ids_and_logprobs_are_taken_as_they_are():
  ids, values = [5, 5, 0, 22], [-0.1, -1e-7, 0.0, -30.25]
  found = ask(question(), token_ids=ids, **logprobs(*values))
  assert found.tokens.dtype == np.int32 and found.tokens.tolist() == ids
  np.testing.assert_array_equal(found.logprobs, np.float32(values))
  assert not found.stopped and found.versions is None


def test_nothing_is_left_to_a_servers_defaults():
  asked = question(stops=(9, 4), limit=5, temperature=0.5)
  body = exchange.body(asked, "tiny")
  assert body == {
      "model": "tiny", "prompt": [3, 1, 2], "max_tokens": 5,
      "temperature": 0.5, "stop_token_ids": [9, 4], "seed": 7, "logprobs": 0,
      "n": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
      "frequency_penalty": 0.0, "repetition_penalty": 1.0, "ignore_eos": True,
      "return_token_ids": True, "return_tokens_as_token_ids": True,
  }  # fmt: skip
  assert json.loads(json.dumps(body)) == body


@pytest.mark.parametrize(
    ("seed", "sent"),
    [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)],
)
def test_every_seed_fits_64_signed_bits(seed, sent):
  assert exchange.body(question(seed=seed), "tiny")["seed"] == sent


def test_a_stop_token_is_the_last():
  found = ask(
      question(stops=(9,)),
      token_ids=[1, 9],
      finish_reason="stop",
      **logprobs(-1, -1),
  )
  assert found.stopped and found.tokens.tolist() == [1, 9]


def test_versions_are_the_servers_word():
  assert ask(question(), policy_versions=[3, 4]).versions == (3, 4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"token_ids": None}, "never tokenised again.*return_token_ids"),
        ({"token_ids": "1234"}, "list of 1 to 4"),
        ({"token_ids": []}, "list of 1 to 4"),
        ({"token_ids": [1, 2, 3, 4, 5]}, "list of 1 to 4"),
        ({"token_ids": [1, 2, 3, VOCAB]}, "another model"),
        ({"token_ids": [1, 2, 3, -1]}, "-1"),
        ({"token_ids": [1, 2, 3, True]}, "True"),
        ({"token_ids": [1, 2, 3, 4.0]}, "4.0"),
        ({"logprobs": None}, "4 numbers.*are none"),
        (logprobs(-1, -1, -1), "are 3"),
        (logprobs(-1, -1, -1, -1, -1), "are 5"),
        (logprobs(-1, -1, -1, float("nan")), "nan"),
        (logprobs(-1, -1, -1, -float("inf")), "inf"),
        (logprobs(-1, -1, -1, -1e300), "-1e.300"),
        (logprobs(-1, -1, -1, -(10**400)), "must be finite"),
        (logprobs(-1, -1, -1, None), "None"),
        (logprobs(-1, -1, -1, "-1"), "'-1'"),
        (logprobs(-1, -1, -1, 0.5), "<= 0"),
        ({"prompt_token_ids": [0, 3, 1, 2]}, "not the ids that were sent"),
        ({"finish_reason": None}, "finish_reason"),
        ({"finish_reason": "stop"}, "generation-config vllm"),
        ({"token_ids": [1, 2, 3], **logprobs(-1, -1, -1)}, "3 of 4"),
        ({"token_ids": [9, 2, 3, 4]}, "behind a stop token"),
        ({"token_ids": [1, 2, 3, 9]}, "'length' and the last token 9"),
        ({"policy_versions": [2]}, "policy_versions"),
        ({"policy_versions": [2, 1]}, "policy_versions"),
        ({"policy_versions": [-5, 1]}, "policy_versions"),
        ({"policy_versions": [1, 10**30]}, "0..4"),
        ({"policy_versions": [1, True]}, "policy_versions"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused(changes, told):
  # Everything else of the answer is right, so it is this that is refused.
  right = {"token_ids": [1, 2, 3, 4], **logprobs(-1, -1, -1, -1)}
  asked = question(stops=(9,))
  ask(asked, finish_reason="length", **right)
  with pytest.raises(AnswerError, match=told):
    ask(asked, **{"finish_reason": "length", **right, **changes})


@pytest.mark.parametrize(
    "answer",
    [None, [], {}, {"choices": []}, {"choices": [1]}, {"choices": [{}, {}]}],
)
def test_an_answer_has_one_choice(answer):
  with pytest.raises(AnswerError, match="choices"):
    exchange.read(answer, question(), vocab_size=VOCAB, newest=4)


def test_an_aborted_request_may_be_made_again():
  with pytest.raises(AbortedError):
    ask(question(), finish_reason="abort", token_ids=None)


def test_the_likeliest_tokens_logprob():
  body = exchange.body(question(), "tiny", top=1)
  assert body["logprobs"] == 1
  told = honest(body)
  told["choices"][0]["logprobs"]["top_logprobs"][0] = {"a": -3.0, "b": -0.5}
  assert exchange.top_logprob(told) == -0.5


@pytest.mark.parametrize("top", [None, [], [{}], [{"a": None}], ["a"]])
def test_without_logprobs_of_likeliest_tokens_it_is_refused(top):
  told = {"choices": [{"logprobs": {"top_logprobs": top}}]}
  with pytest.raises(AnswerError, match="top_logprobs"):
    exchange.top_logprob(told)


@pytest.mark.parametrize(
    ("name", "value"), [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1)]
)
def test_filters_are_refused_by_name(name, value):
  asked = question()
  sampling = dataclasses.replace(asked.sampling, **{name: value})
  asked = dataclasses.replace(asked, sampling=sampling)
  with pytest.raises(ValueError, match=f"{name} must be"):
    exchange.body(asked, "tiny")
