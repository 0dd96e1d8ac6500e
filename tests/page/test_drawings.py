"""Drawings are XML, stay within their frame, and escape what they show."""

import xml.etree.ElementTree as ET

import pytest

from anchorembed.page.drawings import line_chart, map_drawing, ticks
from anchorembed.page.learning_curves import Chart
from anchorembed.page.vector_map import VectorMap

EVIL = '<b>&"'
SVG = ET.Element


def inside(svg: SVG, *names: str) -> None:
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for part in svg.iter():
        for across, down in (("cx", "cy"), ("x", "y")):
            if across in part.attrib:
                assert 0 <= float(part.attrib[across]) <= width
                assert 0 <= float(part.attrib[down]) <= height


@pytest.mark.parametrize(
    "points", [[(1, 2.0), (5, 1.0), (9, 1.5)], [(3, 0.0)], [(1, 1e-9), (2, 2e-9)], [(1, -4.0), (2, 3e6)]]
)
def test_a_chart_shows_each_point_where_it_is(points: list[tuple[float, float]]) -> None:
    svg = ET.fromstring(line_chart(Chart(f"loss {EVIL}", {f"one {EVIL}": points, "two": points})))  # noqa: S314 - our own
    inside(svg)
    circles = [part for part in svg if part.tag == "circle"]
    assert len(circles) == 2 * len(points)
    across = [float(circle.attrib["cx"]) for circle in circles[: len(points)]]
    down = [float(circle.attrib["cy"]) for circle in circles[: len(points)]]
    assert sorted(range(len(points)), key=lambda i: points[i][0]) == sorted(range(len(points)), key=lambda i: across[i])
    assert sorted(range(len(points)), key=lambda i: -points[i][1]) == sorted(range(len(points)), key=lambda i: down[i])
    assert (circles[0][0].text or "").startswith(f"one {EVIL} step {points[0][0]}")
    assert len([part for part in svg if part.text == "two"]) == 1
    assert svg.attrib["aria-label"] == f"loss {EVIL}"


def test_a_map_joins_pairs_and_shows_texts() -> None:
    drawn = VectorMap([(0, 0), (2, 1)], [(0, 0.5), (-4, -1)], [("a", EVIL), ("c", "d")], 0.5)
    svg = ET.fromstring(map_drawing(EVIL, drawn))  # noqa: S314 - our own
    inside(svg)
    kinds = [part.tag for part in svg]
    assert kinds == ["path", "path", "rect", "rect", "circle", "circle"]
    assert [part[0].text for part in svg if len(part)] == [f"document: {EVIL}", "document: d", "query: a", "query: c"]
    first, second = (float(part.attrib["cx"]) for part in svg if part.tag == "circle")
    left = float(svg[3].attrib["x"])
    assert (second - first) / (left + 4 - first) == pytest.approx(2 / -4, abs=0.01)
    ET.fromstring(map_drawing("all the same", VectorMap([(1, 1)], [(1, 1)], [("a", "b")], 0.0)))  # noqa: S314


def test_ticks_are_round_and_in_range() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(1, 24) == [5, 10, 15, 20]
    assert ticks(-0.03, 0.011) == [-0.03, -0.02, -0.01, 0, 0.01]
