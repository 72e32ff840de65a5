"""The colours of lines and roles: the same wherever they stand, and apart."""

import itertools
import pathlib
import re

import numpy as np
import pytest

from mgrpo_jax.report import curves, png, svg, tree

REPORT = pathlib.Path(png.__file__).parent
# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHTS = {
    "all cones": np.eye(3),
    "no green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
XYZ = np.asarray(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = XYZ.sum(1)


def defined(name, variable):
  """What a style sheet sets a variable to: a colour, light and dark or both."""
  text = (REPORT / name).read_text()
  found = re.search(rf"--{variable}: ([^;]+);", text)[1]
  return re.findall("#[0-9a-f]{6}", found)


def palette(name):
  """Its colours, first to last."""
  return [defined(name, f"c{number}") for number in range(svg.PALETTE)]


def linear(colour):
  """Linear RGB of #rrggbb."""
  values = np.asarray([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  low = values <= 0.04045
  return np.where(low, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
  """CIE L*a*b* of linear RGB."""
  x = XYZ @ np.clip(rgb, 0, 1) / WHITE
  f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
  return np.asarray([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
  """WCAG's contrast of two colours."""
  low, high = sorted(XYZ[1] @ linear(colour) for colour in (one, other))
  return (high + 0.05) / (low + 0.05)


def test_a_role_has_the_same_colour_everywhere():
  light = [colours[0] for colours in palette("page.css")]
  assert light == [colour for (colour,) in palette("tree.css")]
  assert tuple(light) == png.COLOURS
  assert len(light) == svg.PALETTE == tree._COLOURS


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("theme", [0, 1])
def test_colours_are_told_apart(theme, sight):
  colours = [pair[theme] for pair in palette("page.css")]
  seen = [lab(np.asarray(SIGHTS[sight]) @ linear(one)) for one in colours]
  for (i, one), (j, other) in itertools.combinations(enumerate(seen), 2):
    assert np.linalg.norm(one - other) > 10, (i, j)  # 2.3 is just noticeable


@pytest.mark.parametrize("theme", [0, 1])
def test_names_in_colour_can_be_read(theme):
  panel = defined("page.css", "panel")[theme]
  for pair in palette("page.css"):
    assert contrast(pair[theme], panel) >= 4.5, pair[theme]


@pytest.mark.parametrize("families", [("seconds",), ("old_kl", "kl")])
def test_lines_that_share_a_colour_are_broken_in_other_ways(families):
  row = {"step": 0, "stage": "a"}
  row |= {f"{name}/p{i}": 1.0 for name in families for i in range(24)}
  rows = [row, row | {"step": 1}]
  (chart,) = [c for c in curves.CHARTS if c.families == families]
  lines = curves.series(rows, chart)
  drawn, _ = svg.chart(chart, lines, curves.stages(rows))
  kinds = re.findall(r'<path class="(line [^"]+)"', drawn)
  assert len(kinds) == len(set(kinds)) == 24 * len(families)
  style = (REPORT / "page.css").read_text()
  patterns = re.findall(r"\.again(\d) \{ stroke-dasharray: ([^;]+);", style)
  assert [number for number, _ in patterns] == ["1", "2", "3"]
  assert len({dashes for _, dashes in patterns}) == 3
