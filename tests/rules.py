"""The rules that the quickstart grades with."""

import functools

from mgrpo_jax import answers, grades, rewards

grade = functools.partial(
    grades.evidence_grade, matches=answers.matches, opened_share=0.5
)
RULES = rewards.Rules(
    format=grades.well_formed,
    correct=answers.matches,
    expert=grade,
    correct_of=rewards.of_root,
    overlong=None,
)
