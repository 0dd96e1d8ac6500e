"""Curves and maps as SVG elements whose colours are the page's, light or dark; texts show when one points at them."""

import math
from html import escape

from anchorembed.page.learning_curves import Chart
from anchorembed.page.vector_map import VectorMap

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 36  # margins
_TICKS = 5
_KINDS = 4  # of curves, which differ in colour and dashes


def line_chart(chart: Chart) -> str:
    """Curves over steps, each with its name, if it has one, in a legend."""
    points = [point for curve in chart.curves.values() for point in curve]
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    legend = 20 * sum(map(bool, chart.curves))
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + legend}" role="img" aria-label="{escape(chart.title)}">']
    for value in ticks(low, high):
        _, y = at(left, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{value:g}</text>')
    for value in ticks(left, right):
        x, _ = at(value, low)
        parts.append(f'<text class="middle" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}">{value:g}</text>')
    parts.append(f'<text class="middle" x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}">step</text>')
    for number, (name, curve) in enumerate(chart.curves.items()):
        kind, y = f"kind{number % _KINDS}", _HEIGHT + 20 * number + 12
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in curve))
        parts.append(f'<polyline class="curve {kind}" points="{path}"/>')
        parts += (_dot(kind, *at(*point), f"{name} step {point[0]:g}: {point[1]:.4g}".strip()) for point in curve)
        if name:
            parts.append(f'<path class="curve {kind}" d="M{_LEFT} {y}h30"/>')
            parts.append(f'<text x="{_LEFT + 38}" y="{y + 4}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def map_drawing(name: str, drawn: VectorMap) -> str:
    """Queries as circles, documents as squares, a pair joined by a line."""
    points = drawn.queries + drawn.documents
    middle = [sum(_range([point[axis] for point in points])) / 2 for axis in (0, 1)]
    reach = max(max(abs(point[axis] - middle[axis]) for point in points) for axis in (0, 1)) or 1.0
    scale = (_HEIGHT / 2 - 12) / reach  # the same on both axes

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return _HEIGHT / 2 + (point[0] - middle[0]) * scale, _HEIGHT / 2 - (point[1] - middle[1]) * scale

    pairs = list(zip(map(at, drawn.queries), map(at, drawn.documents), drawn.texts, strict=True))
    lines = (f'<path class="pair" d="M{x:.1f} {y:.1f}L{u:.1f} {v:.1f}"/>' for (x, y), (u, v), _ in pairs)
    return "".join(
        [
            f'<svg viewBox="0 0 {_HEIGHT} {_HEIGHT}" role="img" aria-label="Map of vectors: {escape(name)}">',
            *lines,
            *(_square(*document, f"document: {text}") for _, document, (_, text) in pairs),
            *(_dot("kind1", *query, f"query: {text}", 5) for query, _, (text, _) in pairs),
            "</svg>",
        ]
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, about five."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _range(values: list[float]) -> tuple[float, float]:
    """Lowest and highest value; half a unit below and above if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _dot(kind: str, x: float, y: float, text: str, radius: int = 3) -> str:
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(text)}</title></circle>'


def _square(x: float, y: float, text: str) -> str:
    title = f"<title>{escape(text)}</title>"
    return f'<rect class="dot kind0" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{title}</rect>'
