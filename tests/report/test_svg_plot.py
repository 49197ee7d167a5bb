"""SVG plot of the utility study."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import pytest

from sslcli.report.svg_plot import curves, ticks


def test_the_picture_holds_every_point_within_its_frame() -> None:
    arm = {"top1": 0.5, "std": None}
    points = [
        {"labels": n, "trained": arm, "random": arm, "utility": u, "bound": b, "censored": b == "lower"}
        for n, u, b in ((10, 3.0, None), (100, -0.5, "upper"), (1000, 9.0, "lower"))
    ]
    root = ET.fromstring(curves(points))
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    circles = [e.attrib for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 9
    assert all(0 < float(c["cx"]) < width and 0 < float(c["cy"]) < height for c in circles)
    assert [c["fill"] for c in circles[-3:]] == ["#333", "white", "white"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.9), (-0.5, 9.0), (0.0, 0.0), (0.0, 250.0)])
def test_marks_are_few_and_within(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 9
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
    assert all(math.isclose(b - a, marks[1] - marks[0]) for a, b in itertools.pairwise(marks))
