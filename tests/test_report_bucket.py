"""What the inspector says of a bucket, whole or damaged."""

import json
import math
import time
import uuid

import killed
import pytest
from commands import command, refused

from mgrpo_jax import atomic, bases, ownership, publish, store
from mgrpo_jax.report import bucket

NOW = 1_800_000_000.0


@pytest.fixture
def full(tmp_path, monkeypatch) -> store.Store:
  """Two policies, a lease, two members, three steps."""
  made = store.open_folder(tmp_path)
  monkeypatch.setattr(time, "time", lambda: NOW - 300)
  ownership.claim(made, "the-run", {"seed": 0}, jobs=False)
  for policy, newest in (("main", 3), ("researcher", 0)):
    for number in range(newest + 1):
      publish.publish(
          made, policy, number, killed.tree(number), keep=9, meta={}
      )
  publish.lease(made, "main", 1, holder="baseline", seconds=math.inf)
  publish.lease(made, "main", 2, holder="replica", seconds=60)
  for policy, told in (
      ("main", {"ready": 2, "beat": 9}),
      ("researcher", {"version": 0}),
  ):
    record = told | {"address": "http://127.0.0.1:1", "time": NOW - 5}
    made.put(f"members/{policy}/0.json", json.dumps(record).encode())
  record = {"address": "http://127.0.0.1:2", "version": 2, "time": NOW - 1}
  made.put("replicas/main/a1.json", json.dumps(record).encode())
  for step in range(3):
    made.put(f"steps/{step}.json", b"{}")
  return made


def test_versions_members_and_leases_are_told(full):
  found = bucket.look(full, now=NOW)
  assert found.run["run"] == "the-run"
  assert found.damaged == ()
  rows = found.versions["main"]
  assert [row["number"] for row in rows] == [0, 1, 2, 3]
  assert [row["latest"] for row in rows] == [False, False, False, True]
  size = sum(array.nbytes for array in killed.tree(0).values())
  assert {row["bytes"] for row in rows} == {f"{size:,}"}
  assert {(row["age"], row["arrays"]) for row in rows} == {("5 min", 4)}
  by_policy = {member["policy"]: member for member in found.members}
  assert by_policy["main"]["heartbeat"] == "5 s ago"
  assert by_policy["main"]["lag"] == "1 step"
  assert by_policy["researcher"]["lag"] == "0 versions"
  (helper,) = found.replicas
  assert (helper["id"], helper["lag"]) == ("a1", "1 version")
  baseline, replica = found.leases
  assert (baseline["left"], baseline["lag"]) == ("for good", "2 versions")
  assert (replica["left"], replica["lag"]) == ("over (4 min ago)", "1 version")
  assert found.records["steps"] == 3


def test_a_clock_ahead_of_ours_makes_no_negative_time(full):
  told = {"address": "http://127.0.0.1:1", "time": NOW + 0.4, "ready": 1}
  full.put("members/main/0.json", json.dumps(told).encode())
  rows = {row["policy"]: row for row in bucket.look(full, now=NOW).members}
  assert rows["main"]["heartbeat"] == "0 s ago"


def test_who_waits_for_whom_is_told(full):
  told = {"waits": "researcher", "wanted": "to have done 1 steps", "ready": -1}
  full.put("members/main/0.json", json.dumps(told).encode())
  rows = {row["policy"]: row for row in bucket.look(full, now=NOW).members}
  assert rows["main"]["lag"] == "not ready"
  assert rows["main"]["waits for"] == "researcher to have done 1 steps"
  assert rows["researcher"]["waits for"] == ""


def test_differences_are_told_from_whole_versions(full, tmp_path):
  held = bases.Bases(9)
  for number in range(4, 6):
    weights = killed.tree(number)
    publish.publish(full, "main", number, weights, keep=9, meta={}, bases=held)
  found = bucket.look(full, now=NOW)
  rows = {row["number"]: row for row in found.versions["main"]}
  kinds = [rows[n]["kind"] for n in (0, 4, 5)]
  assert kinds == ["whole", "whole", "delta of 4"]
  for number, row in rows.items():
    files = (tmp_path / f"policies/main/v{number}").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    assert row["stored"] == f"{size:,}"
  assert rows[5]["bytes"] == rows[4]["bytes"]
  assert int(rows[5]["stored"].replace(",", "")) < 0.1 * sum(
      array.nbytes for array in killed.tree(5).values()
  )
  assert "delta of 4" in bucket.text(found)


def test_where_a_listing_tells_no_sizes_none_is_claimed():
  made = store.open(f"memory://{uuid.uuid4().hex}")
  publish.publish(made, "main", 0, killed.tree(0), keep=9, meta={})
  (row,) = bucket.look(made, now=NOW).versions["main"]
  assert row["stored"] == "?"


@pytest.mark.parametrize("base", [0, {}, {"number": "\x1b[2J"}])
def test_a_base_that_is_not_named_is_no_error(full, base):
  key = "policies/main/v3/manifest.json"
  body = json.loads(full.get(key)) | {"base": base}
  full.put(key, json.dumps(body).encode())
  rows = bucket.look(full, now=NOW).versions["main"]
  assert rows[3]["kind"] == "delta of ?"


def test_looking_changes_nothing(full, tmp_path):
  def state():
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in tmp_path.rglob("*")
        if path.is_file()
    }

  before = state()
  bucket.look(full, now=NOW)
  assert state() == before


@pytest.mark.parametrize(
    "damage", [b"", b"[]", b"\xff", b"[" * 100_000, b'"\x1b[31m"']
)
def test_what_is_damaged_is_named(full, damage):
  keys = [key for key in full.list() if "/c/" not in key]
  damaged = [key for key in keys if not key.endswith("zarr.json")]
  for key in damaged:
    full.put(key, damage)
  found = bucket.look(full, now=NOW)
  named = {line.split(" ", 1)[0] for line in found.damaged}
  assert named == {k for k in damaged if not k.startswith("steps/")}
  assert "\x1b" not in bucket.text(found)


def test_a_member_cannot_write_to_the_terminal(full):
  record = {"address": "\x1b[2J\nx", "time": NOW, "ready": 10**400}
  full.put("members/main/0.json", json.dumps(record).encode())
  text = bucket.text(bucket.look(full, now=NOW))
  assert "\x1b" not in text
  assert "\\x1b[2J\\nx" in text


def test_an_empty_bucket_is_no_error(tmp_path):
  text = bucket.text(bucket.look(store.open_folder(tmp_path), now=NOW))
  assert "nobody's yet" in text and "keys: none" in text


def test_the_command_prints_it(full):
  done = command("view", f"--bucket={full.url}")
  assert done.returncode == 0, done.stderr
  assert "run the-run" in done.stdout
  assert "http://127.0.0.1:1" in done.stdout
  assert "must start with" in refused(command("view", "--bucket=ftp://x"))


@pytest.mark.parametrize(
    "one",
    [
        {"shape": [10**400], "dtype": "float32"},
        {"shape": ["a", 10**11], "dtype": "float32"},
        {"shape": [[0], 10**10], "dtype": "float32"},
        {"shape": [4], "dtype": "(1,"},
    ],
)
def test_nonsense_in_a_manifest_is_no_size(full, one):
  value = json.dumps({"arrays": {"w": one}}).encode()
  full.put("policies/main/v3/manifest.json", value)
  rows = bucket.look(full, now=NOW).versions["main"]
  assert [row["bytes"] for row in rows][-1] == "?"


def test_what_cannot_be_read_is_named_beside_the_rest(full, monkeypatch):
  straight = full.get

  def get(key):
    if key == "policies/main/LATEST":
      raise atomic.StorageError(f"cannot read {key}: permission denied")
    return straight(key)

  monkeypatch.setattr(full, "get", get)
  found = bucket.look(full, now=NOW)
  assert "cannot read policies/main/LATEST: permission denied" in found.damaged
  assert len(found.versions["main"]) == 4


def test_a_run_s_name_moves_no_cursor(full):
  full.put("run.json", b'{"run": "\\u001b[31mred"}')
  assert "\x1b" not in bucket.text(bucket.look(full, now=NOW))
