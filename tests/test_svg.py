"""Charts: what is drawn where, also for values that are not finite and for very many points."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mim_jax.report.svg import (
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Reference,
    Series,
    chart,
    labels,
    ticks,
    whole,
)

MARKUP = {"svg": "http://www.w3.org/2000/svg"}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" '))


def paths(svg: str, kind: str) -> list[np.ndarray]:
    """Returns the points in pixels of each part of the paths of a class."""
    lines_of_chart = []
    for path in parsed(svg).iterfind(".//svg:path[@class]", MARKUP):
        if kind in path.get("class").split():
            for part in path.get("d").split("M")[1:]:
                part = part.split("l")[0]
                numbers = re.findall(r"-?[\d.]+", part.split("h")[0])
                lines_of_chart.append(np.array(numbers, float).reshape(-1, 2))
    return lines_of_chart


def test_a_line():
    points = [(0, 1.0), (50, 3.0), (100, 2.0)]
    svg = chart("loss", [Series("training", points)])
    (line,) = paths(svg, "line")
    assert line[:, 0] == pytest.approx([LEFT, 231, WIDTH - RIGHT])
    heights = (line[:, 1] - line[0, 1]) / (line[1, 1] - line[0, 1])
    assert heights == pytest.approx([0, 1, 0.5], abs=0.01)
    assert line[1, 1] < line[0, 1]
    label = parsed(svg).get("aria-label")
    assert label == ("loss. training: 1 at step 0, 2 at step 100, lowest 1, highest 3.")


def test_values_that_are_not_finite():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, 1.0), (5, math.inf)]
    svg = chart("loss", [Series("training", points)])
    assert [len(part) for part in paths(svg, "line")] == [2, 2]
    assert len(paths(svg, "bad")) == 2
    assert "2 values not finite" in svg
    assert "nan" not in svg.replace("not finite", "")
    nothing = chart("loss", [Series("training", [(0, math.nan)])])
    assert "no finite values" in nothing
    parsed(chart("loss", []))
    parsed(chart("loss", [Series("training", [(7, 0.0)])]))


def test_many_points_are_a_band_and_its_mean():
    steps = np.arange(200_000)
    values = np.where(steps % 2, 1.0, 3.0)
    values[100_000] = math.nan
    svg = chart(
        "loss", [Series("training", list(zip(steps.tolist(), values.tolist(), strict=True)))]
    )
    assert len(svg) < 40_000
    (band,) = paths(svg, "band")
    low, high = band[:, 1].max(), band[:, 1].min()
    (line,) = paths(svg, "line")
    np.testing.assert_allclose(line[:, 1], (low + high) / 2, atol=0.2)
    assert len(paths(svg, "bad")) == 1


def test_outliers_leave_the_picture():
    points = [(i, 1e4 if i == 0 else 1.0 + 0.1 * math.sin(i)) for i in range(200)]
    (line,) = paths(chart("loss", [Series("a", points)], log_scale=False), "line")
    assert np.ptp(line[1:, 1]) > 80
    assert line[:, 1].min() >= TOP - 0.1


def test_a_logarithmic_scale():
    points = [(0, 1e-3), (1, 1e-1), (2, 10.0)]
    for scale, even in ((None, True), (False, False)):
        (line,) = paths(chart("norm", [Series("a", points)], log_scale=scale), "line")
        steps = np.diff(line[:, 1])
        assert np.isclose(*steps, atol=0.2) == even


def test_references_are_drawn_where_they_are_near():
    points = [(0, 0.2), (1, 0.4)]
    svg = chart("accuracy", [Series("a", points)], [Reference(0.1, "chance"), Reference(9, "far")])
    assert "chance" in svg
    assert "far" not in svg


def test_a_reference_can_be_a_band():
    svg = chart("accuracy", [Series("a", [(0, 0.2), (1, 0.4)])], [Reference(0.25, "band", 0.35)])
    [path] = re.findall(r'class="reference"><path d="M[\d.]+ ([\d.]+)H[\d.]+V([\d.]+)H', svg)
    [low, high] = paths(svg, "line")[0][:, 1]  # of 0.2 and 0.4
    ends = [np.interp(x, (0.2, 0.4), (low, high)) for x in (0.25, 0.35)]
    np.testing.assert_allclose(np.array(path, float), ends, atol=0.1)


def test_text_is_escaped():
    svg = chart("<script>", [Series('"><script>alert(1)</script>', [(0, 1.0)])])
    assert "<script" not in svg
    parsed(svg)


@pytest.mark.parametrize("low, high", [(0, 1), (3.2, 3.21), (0, 2400), (-5, 1e7), (1e-9, 3e-9)])
def test_ticks_are_round_and_inside(low, high):
    places = ticks(low, high, 5)
    assert 2 <= len(places) <= 11
    assert low - 1e-12 <= places[0] <= places[-1] <= high * (1 + 1e-9)
    assert np.allclose(np.diff(places), places[1] - places[0])


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 0.5, 1], ["0", "0.5", "1"]),
        ([0.25, 0.275, 0.3], ["0.25", "0.275", "0.3"]),
        ([0, 50, 100], ["0", "50", "100"]),
        ([10, 12.5, 15], ["10", "12.5", "15"]),
        ([200_000, 400_000], ["200,000", "400,000"]),
        ([0.59, 0.5925], ["0.59", "0.5925"]),
        ([2.1970, 2.1971, 2.1972], ["2.197", "2.1971", "2.1972"]),
        ([1000, 1500, 2000], ["1,000", "1,500", "2,000"]),
        ([0, 2e-4, 4e-4], ["0", "2e-4", "4e-4"]),
        ([6.1e-5, 6.2e-5], ["6.1e-5", "6.2e-5"]),
    ],
)
def test_labels_tell_ticks_apart(values, expected):
    assert labels(values) == expected


def test_steps_are_whole():
    assert ticks(0, 3, 5, integers=True) == [0, 1, 2, 3]
    assert [whole(x) for x in (500, 2500, 20_000, 1.5e6)] == ["500", "2,500", "20k", "1.5M"]


def test_an_axis_from_zero():
    svg = chart("speed", [Series("a", [(0, 99.0), (1, 100.0)])], from_zero=True)
    (line,) = paths(svg, "line")
    assert abs(line[0, 1] - line[1, 1]) < 3
    assert line[:, 1].max() < HEIGHT / 4
