"""Records what calls of the quickstart's team were graded, for test_shares.py.

    python -m experiments.train --config=configs/quickstart.py --workdir=DIR \
        --config.stages.easy.steps=1 --config.stages.hard.steps=2 \
        --config.evaluation.tasks=8 --config.evaluation.final_tasks=16
    python tests/golden/make_quickstart_rewards.py DIR

Writes quickstart_rewards.json: of every step its groups, of a group its calls,
of a call its rollout, role, where its caller stands, and the components of its
reward: format, correct, expert.
"""

import json
import pathlib
import sys

from mgrpo_jax.report import records

OUT = pathlib.Path(__file__).parent / "quickstart_rewards.json"


def main() -> None:
  steps = [
      [
          [
              [call["rollout"], call["role"], call["parent"]]
              + [call["rewards"][x] for x in ("format", "correct", "expert")]
              for call in group["trajectories"]
          ]
          for group in records.read_step(path).groups
      ]
      for path in sorted(pathlib.Path(sys.argv[1], "rollouts").iterdir())
  ]
  lines = ",\n".join(json.dumps(step, separators=(",", ":")) for step in steps)
  OUT.write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
  main()
