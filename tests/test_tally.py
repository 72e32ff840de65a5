"""How far a sweep is, in lines."""

from experiments.tally import Tally


class Clock:
  """Seconds that a test moves by hand."""

  seconds = 0.0

  def __call__(self):
    return self.seconds


def test_the_tally_counts_and_estimates(tmp_path):
  clock = Clock()
  with open(tmp_path / "said", "w+") as stream:
    tally = Tally(stream, total=6, finished=1, parallel=2, clock=clock)
    tally.show([])
    assert tally.seconds_left([5.0]) is None
    tally.add(100.0, True, "finished a")
    tally.show([10.0])
    tally.add(1.0, False, "failed b")
    tally.show([])
    clock.seconds = 301.0
    tally.show([40.0, 500.0])
    tally.show([41.0, 501.0])
    tally.close()
    stream.seek(0)
    said = stream.read().splitlines()
  assert said == [
      "1 of 6 runs finished · 1 of them before",
      "finished a",
      "2 of 6 runs finished · 1 of them before · 1 running, for 10s · 3m15s"
      " left",
      "failed b",
      "2 of 6 runs finished · 1 of them before · 1 failed · 2m30s left",
      "2 of 6 runs finished · 1 of them before · 1 failed · 2 running, for"
      " 8m20s · 1m20s left",
  ]
  assert tally.failed == 1
