"""Samplers that come and go: same tokens, nothing lost, nothing stale."""

import asyncio
import contextlib
import dataclasses
import json
import time

import jax
import numpy as np
import pytest
import replicated
from replicated import until
from test_engine import (
    CONFIG,
    CONTEXT,
    converse,
    draw,
    everything_is_free,
    make,
    prompt,
    weights,
)

from mgrpo_jax import leaves, store
from mgrpo_jax.atomic import MismatchError, StorageError
from mgrpo_jax.replicas import pool as pool_module
from mgrpo_jax.replicas import records, wire
from mgrpo_jax.replicas.records import Entry
from mgrpo_jax.replicas.weights import Weights
from mgrpo_jax.sampler.interface import EngineError
from mgrpo_jax.serving.errors import RequestError
from mgrpo_jax.types import Completion

POLICY = replicated.policy_of(CONFIG, weights())
ENTRY = Entry(
    policy="main", id="a1", address="http://10.0.0.1:80", slots=8,
    version=3, weights="d", beat=5, time=1.5,
)  # fmt: skip


@pytest.fixture
def bucket(tmp_path):
  return store.open_folder(tmp_path)


def test_records_come_back(bucket):
  other = dataclasses.replace(ENTRY, id="b2")
  records.write(bucket, ENTRY)
  records.write(bucket, other)
  assert records.read(bucket, "main") == {"a1": ENTRY, "b2": other}
  assert records.read(bucket, "researcher") == {}
  records.remove(bucket, "main", "a1")
  assert records.read(bucket, "main") == {"b2": other}


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "ftp://x:1"},
        {"address": "http://nowhere"},
        {"slots": 0},
        {"slots": True},
        {"version": -1},
        {"weights": 7},
        {"id": "../b"},
        {"more": 1},
        {"format": 9},
    ],
)
def test_records_that_cannot_be_believed_are_left_out(
    bucket, tmp_path, changes
):
  records.write(bucket, ENTRY)
  body = {"format": records.FORMAT, **dataclasses.asdict(ENTRY), "id": "z"}
  record = leaves.seal(body | changes)
  bucket.put("replicas/main/z.json", json.dumps(record).encode())
  bucket.put("replicas/main/y.json", b"{")
  bucket.put("replicas/main/x.json", json.dumps(ENTRY.time).encode())
  bucket.put("replicas/main/w", b"")
  (tmp_path / "replicas/main/.DS_Store").write_bytes(b"")
  (tmp_path / "replicas/main/a b.json").write_bytes(b"")
  assert records.read(bucket, "main") == {"a1": ENTRY}


QUESTION = wire.Question(
    version=3, digest="d", tokens=(5, 6), seed=2**64 - 1, session="s",
    sampling=draw(limit=4, temperature=0.5, top_p=0.9),
)  # fmt: skip
COMPLETION = Completion(
    tokens=np.array([7, 8], np.int32),
    logprobs=np.float32([-0.1, -1 / 3]),
    raw_logprobs=np.float32([-1e-30, -17.25]),
    finish="length",
    version_min=3,
    version_max=4,
)


def test_what_crosses_comes_back_to_the_bit():
  body = json.dumps(wire.write_question(QUESTION)).encode()
  assert wire.read_question(body) == QUESTION
  told = json.loads(json.dumps(wire.write_answer(COMPLETION)))
  back = wire.read_answer(told, QUESTION, newest=4, vocab_size=9)
  for name, value in vars(COMPLETION).items():
    np.testing.assert_array_equal(getattr(back, name), value)
    assert type(getattr(back, name)) is type(value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": [1, 2, 3, 4, 5]}, "at most 4 ids"),
        ({"tokens": [1, -2]}, "ids below 9"),
        ({"tokens": [1, 9]}, "ids below 9"),
        ({"tokens": "ab"}, "at most 4 ids"),
        ({"finish": "tired"}, "impossible"),
        ({"logprobs": [-1.0]}, "logprobs must be 2 numbers"),
        ({"logprobs": [-1.0, None]}, "must be finite"),
        ({"raw_logprobs": [-1.0, 1e999]}, "must be finite"),
        ({"raw_logprobs": [-1.0, -1e300]}, "must be finite"),
        ({"raw_logprobs": [-1.0, 10**400]}, "must be finite"),
        ({"versions": [2, 3]}, "must be 3 to 4"),
        ({"versions": [3, 5]}, "must be 3 to 4"),
        ({"versions": [3]}, "oldest and the newest"),
    ],
)
def test_answers_that_do_not_add_up_are_refused(changes, told):
  answer = json.loads(json.dumps(wire.write_answer(COMPLETION))) | changes
  with pytest.raises(wire.AnswerError, match=told):
    wire.read_answer(answer, QUESTION, newest=4, vocab_size=9)
  with pytest.raises(wire.AnswerError, match="no object"):
    wire.read_answer([], QUESTION, newest=4, vocab_size=9)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": []}, "at least one"),
        ({"tokens": [True]}, "at least one"),
        ({"seed": 2**64}, "seed"),
        ({"seed": None}, "seed"),
        ({"version": -1}, "version"),
        ({"digest": None}, "digest: missing"),
        ({"more": 1}, "more: unknown"),
        ({"sampling": {}}, "the fields"),
        ({"sampling": {"temperature": -1.0}}, "temperature must be"),
        ({"sampling": {"temperature": "1"}}, "a number"),
        ({"sampling": {"max_new_tokens": 1.5}}, "a whole number"),
        ({"sampling": {"stop_ids": [-1]}}, "a list of token ids"),
    ],
)
def test_questions_that_make_no_sense_are_refused(changes, told):
  body = json.loads(json.dumps(wire.write_question(QUESTION)))
  given = changes.get("sampling")
  if given:
    changes = {"sampling": body["sampling"] | given}
  with pytest.raises(RequestError, match=told):
    wire.read_question(json.dumps(body | changes).encode())


@contextlib.asynccontextmanager
async def pool(bucket, *, token=replicated.TOKEN, **sizes):
  made = replicated.pool(
      make(**sizes), bucket, "main", slots=8, context=CONTEXT,
      vocab_size=CONFIG.vocab_size, token=token,
  )  # fmt: skip
  async with made:
    yield made


async def begun(made, bucket, number=0, params=None):
  """Publishes a version and tells the pool of it."""
  params = weights() if params is None else params
  made.update(params, number)
  made.published(replicated.put(bucket, "main", POLICY, params, number))


def helped(made, count=1):
  return lambda: made.stats()["replicas"] == count


def test_conversations_are_what_they_are_alone(bucket):
  async def alone():
    async with make() as engine:
      return await asyncio.gather(*(converse(engine, n) for n in range(24)))

  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY) as one,
        replicated.replica(bucket, "main", make(), POLICY) as other,
    ):
      await begun(made, bucket)
      await until(helped(made, 2))
      told = await asyncio.gather(*(converse(made, n) for n in range(24)))
      shares = [e._engine.stats()["generated"] for e in (one, other)]
      stats = made.stats()
      for engine in (made.engine, one._engine, other._engine):
        await until(lambda e=engine: everything_is_free(e))
      return told, shares, stats

  told, shares, stats = asyncio.run(run())
  assert [[t for t, _ in one] for one in told] == [
      [t for t, _ in one] for one in asyncio.run(alone())
  ]
  assert all(shares) and sum(shares) == stats["elsewhere"]
  tokens = sum(len(turn) for one in told for turn, _ in one)
  assert stats["generated"] == tokens > stats["elsewhere"]


def test_a_session_stays_where_its_cache_is(bucket):
  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY) as one,
    ):
      await begun(made, bucket)
      await until(helped(made))
      tokens, lengths = prompt(0, 20), []
      for turn in range(4):
        made._here = 0 if turn else 10**6  # only the first must go there
        drawn = await made.generate(tokens, draw(4), turn, session="x")
        tokens = [*tokens, *drawn.tokens.tolist(), *prompt(turn, 2)]
        lengths.append(len(drawn.tokens))
      made.release("x")
      await until(lambda: everything_is_free(one._engine))
      return made.engine.stats(), one._engine.stats(), lengths

  here, there, lengths = asyncio.run(run())
  assert here["generated"] == here["prefilled"] == 0
  assert there["generated"] == sum(lengths)
  # The prompt once, padded; then what each turn added.
  assert there["prefilled"] < 20 + 3 * (2 + max(lengths)) + 4 * 16


def test_only_the_weights_of_the_moment_are_sampled_from(bucket):
  other = weights(1)

  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY) as one,
    ):
      await begun(made, bucket)
      await until(helped(made))
      made.update(other, 1)  # not in the store yet
      assert made.stats()["replicas"] == 0
      here = await made.generate(prompt(0, 5), draw(), 7)
      made.published(replicated.put(bucket, "main", POLICY, other, 1))
      await until(helped(made))
      made._here = 10**6  # so that nobody samples here
      there = await made.generate(prompt(0, 5), draw(), 7)
      assert made.stats()["elsewhere"] == len(there.tokens)
      return here, there, one.said, (made.helpers(), made.helpers())

  here, there, said, helpers = asyncio.run(run())
  assert here.tokens.tolist() == there.tokens.tolist()
  assert (there.version_min, there.version_max) == (1, 1)
  assert said == ["samples from version 0", "samples from version 1"]
  assert helpers == (1, 0)


def test_the_same_number_of_another_past_is_other_weights(bucket):
  async def run():
    async with pool(bucket) as made:
      await begun(made, bucket, 1)
      async with replicated.replica(bucket, "main", make(), POLICY) as one:
        await until(helped(made))
        again = weights(1)
        made.update(again, 1)
        version = replicated.put(bucket, "main", POLICY, again, 1)
        made._published = (1, version.digest)  # as one that began anew
        assert made.stats()["replicas"] == 0
        await until(helped(made))  # it looked for itself
        return one._entry.weights, version.digest

  has, wanted = asyncio.run(run())
  assert has == wanted


def test_a_replica_refuses_what_it_does_not_have(bucket):
  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY),
    ):
      await begun(made, bucket)
      await until(helped(made))
      (member,) = made._members.values()
      made._here = 10**6
      asked = dataclasses.replace(QUESTION, version=9, digest="other")
      with pytest.raises(ConnectionError, match="version: 9 is not"):
        await made._ask(member, asked)

  asyncio.run(run())


@pytest.mark.parametrize("how", ["leaves", "dies", "hangs"])
def test_what_a_lost_replica_had_is_sampled_elsewhere(bucket, how, caplog):
  async def run():
    async with (
        pool(bucket) as made,
        contextlib.AsyncExitStack() as life,
    ):
      one = await life.enter_async_context(
          replicated.replica(bucket, "main", make(decode_steps=1), POLICY)
      )
      await begun(made, bucket)
      await until(helped(made))
      if how == "hangs":  # it is there, but neither answers nor beats
        one._engine.generate = lambda *_, **__: asyncio.sleep(3600)
        one._sign = lambda: asyncio.sleep(0)
      talks = [asyncio.create_task(converse(made, n, 4)) for n in range(8)]
      (member,) = made._members.values()
      await until(lambda: member.busy)
      if how == "dies":
        one._store = store.open("memory://")  # its record stays
      if how != "hangs":
        await life.aclose()
      told = await asyncio.gather(*talks)
      await until(helped(made, 0))
      await until(lambda: everything_is_free(made.engine))
      return told

  async def alone():
    async with make() as engine:
      return [await converse(engine, n, 4) for n in range(8)]

  told, expected = asyncio.run(run()), asyncio.run(alone())
  assert [[t for t, _ in one] for one in told] == [
      [t for t, _ in one] for one in expected
  ]
  if how != "leaves":
    assert "a replica of main was lost" in caplog.text


def test_a_wrong_token_is_told_and_costs_only_help(bucket, caplog):
  async def run():
    async with (
        pool(bucket, token="another-one-long-enough") as made,
        replicated.replica(bucket, "main", make(), POLICY),
    ):
      await begun(made, bucket)
      await until(lambda: "status 401" in caplog.text)
      await asyncio.sleep(4 * replicated.EVERY)  # signs of life change nothing
      assert made.stats()["replicas"] == 0
      return await asyncio.gather(*(converse(made, n) for n in range(6)))

  assert len(asyncio.run(run())) == 6
  assert caplog.text.count("status 401") == 1


def test_an_address_that_is_none_harms_no_others(bucket, caplog):
  async def run():
    async with pool(bucket) as made:
      wrong = dataclasses.replace(ENTRY, address="http://10.0.0.256:80")
      records.write(bucket, wrong)
      await begun(made, bucket)
      async with replicated.replica(bucket, "main", make(), POLICY):
        await until(helped(made))

  asyncio.run(run())
  assert caplog.text.count("Invalid IPv4 address") == 1


def test_a_replica_that_beats_but_does_not_answer_is_given_nothing(bucket):
  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY) as one,
    ):
      await begun(made, bucket)
      await until(helped(made))
      one._check = lambda *_: (_ for _ in ()).throw(OSError("gone"))
      made._here = 10**6
      for number in range(3):
        await made.generate(prompt(number, 5), draw(), number)
        await asyncio.sleep(3 * replicated.EVERY)
        assert made.stats()["replicas"] == 0
      assert made.stats()["elsewhere"] == 0

  asyncio.run(run())


def test_weights_are_read_once_whoever_asks_for_them(bucket, monkeypatch):
  reads = []

  def slow(self, *arguments):
    reads.append(1)
    time.sleep(0.3)
    return straight(self, *arguments)

  straight = Weights.read
  monkeypatch.setattr(Weights, "read", slow)
  monkeypatch.setattr(pool_module, "_PROBE", 0.05)

  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY),
    ):
      await begun(made, bucket)
      await until(helped(made))

  asyncio.run(run())
  assert len(reads) == 1


def test_a_dead_record_is_not_believed_and_removed(bucket, monkeypatch):
  monkeypatch.setattr(pool_module, "_DEAD", 4)

  async def run():
    async with pool(bucket) as made:
      await begun(made, bucket)
      digest = made._published[1]
      dead = dataclasses.replace(ENTRY, version=0, weights=digest)
      records.write(bucket, dead)
      await until(lambda: made._members)
      assert made.stats()["replicas"] == 0
      await until(lambda: not records.read(bucket, "main"))

  asyncio.run(run())


def test_who_cannot_remove_a_record_looks_on_and_tries_again(
    bucket, monkeypatch
):
  straight, failed = records.remove, []

  def remove(*what):
    if not failed:
      failed.append(what)
      raise StorageError("cannot delete")
    straight(*what)

  monkeypatch.setattr(pool_module, "_DEAD", 4)
  monkeypatch.setattr(records, "remove", remove)

  async def run():
    async with pool(bucket) as made:
      await begun(made, bucket)
      digest = made._published[1]
      dead = dataclasses.replace(ENTRY, version=0, weights=digest)
      records.write(bucket, dead)
      await until(lambda: failed)
      await until(lambda: not records.read(bucket, "main"))
      records.write(bucket, dataclasses.replace(dead, id="a2"))
      await until(lambda: "a2" in made._members)

  asyncio.run(run())


def test_the_search_for_replicas_outlives_any_error(
    bucket, monkeypatch, caplog
):
  straight, failed = records.read, []

  def read(*what):
    if len(failed) < 3:
      failed.append(what)
      raise OSError("a fault")
    return straight(*what)

  monkeypatch.setattr(records, "read", read)

  async def run():
    async with pool(bucket) as made:
      await until(lambda: len(failed) == 3)
      records.write(bucket, ENTRY)
      await until(lambda: made._members)

  asyncio.run(run())
  assert caplog.text.count("replicas of main: OSError('a fault')") == 1


def test_what_fails_beside_requests_is_told(bucket, caplog):
  async def run():
    async def fail():
      raise OSError("a fault")

    async with pool(bucket) as made:
      made._do_aside(fail())
      await until(lambda: "replicas of main: OSError('a fault')" in caplog.text)

  asyncio.run(run())


def test_a_cancelled_call_frees_the_replicas_slot(bucket):
  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(decode_steps=1), POLICY) as one,
    ):
      await begun(made, bucket)
      await until(helped(made))
      made._here = 10**6
      call = asyncio.create_task(
          made.generate(prompt(1, 4), draw(50, stop_ids=()), 3, session="x")
      )
      await until(lambda: not everything_is_free(one._engine))
      call.cancel()
      with pytest.raises(asyncio.CancelledError):
        await call
      await until(lambda: everything_is_free(one._engine))
      (member,) = made._members.values()
      assert member.busy == 0
      made.release("x")

  asyncio.run(run())


def test_nonsense_is_refused_as_by_an_engine(bucket):
  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY),
    ):
      await begun(made, bucket)
      await until(helped(made))
      made._here = 10**6
      with pytest.raises(ValueError, match="ids in 0"):
        await made.generate([10**6], draw(), 0)
      assert made.stats()["replicas"] == 1
      made._here = 0
    with pytest.raises(EngineError, match="not running"):
      await made.generate([5], draw(), 0)

  asyncio.run(run())


def test_a_replica_ends_where_another_policy_is_published(bucket):
  other = replicated.policy_of(CONFIG, weights(5))

  async def run():
    replicated.put(bucket, "main", other, weights(5), 0)
    async with replicated.replica(bucket, "main", make(), POLICY) as one:
      with pytest.raises(MismatchError, match="not the one that the run began"):
        await one.run()

  asyncio.run(run())


def test_a_corrupt_version_is_not_sampled_from(bucket, tmp_path):
  async def run():
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY) as one,
    ):
      await begun(made, bucket)
      await until(helped(made))
      version = replicated.put(bucket, "main", POLICY, weights(1), 1)
      for path in (tmp_path / version.path).rglob("c/*"):
        if path.is_file():
          path.write_bytes(b"\0" * path.stat().st_size)
      made.update(weights(1), 1)
      made.published(version)
      await until(lambda: one.said[-1].startswith("samples from version 0"))
      await until(lambda: any("skipped" in line for line in one.said))
      assert made.stats()["replicas"] == 0
      assert len((await made.generate([5], draw(), 0)).tokens)

  asyncio.run(run())


def test_an_adapter_is_merged(bucket):
  from mgrpo_jax.policy import lora as adapters
  from mgrpo_jax.policy.lora import LoRA

  lora = LoRA(rank=2, alpha=4.0, targets=("query", "value"))
  adapter = jax.tree.map(
      lambda x: np.asarray(x) + 0.3,
      adapters.init(jax.random.key(3), CONFIG, lora),
  )
  params = jax.device_get(adapters.merge(weights(), adapter, lora=lora))

  async def run():
    from mgrpo_jax import publish
    from mgrpo_jax.policy import fingerprint

    meta = {"fingerprint": fingerprint.fingerprint(POLICY, lora)}
    async with (
        pool(bucket) as made,
        replicated.replica(bucket, "main", make(), POLICY, lora=lora),
    ):
      made.update(params, 1)
      here = await made.generate(prompt(0, 5), draw(temperature=0.0), 7)
      made.published(
          publish.publish(bucket, "main", 1, adapter, keep=1, meta=meta).version
      )
      await until(helped(made))
      made._here = 10**6
      there = await made.generate(prompt(0, 5), draw(temperature=0.0), 7)
      assert made.stats()["elsewhere"]
      return here, there

  here, there = asyncio.run(run())
  assert here.tokens.tolist() == there.tokens.tolist()
  np.testing.assert_allclose(here.logprobs, there.logprobs, atol=1e-5)
