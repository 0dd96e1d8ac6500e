"""The page as HTML."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from anchorembed.page.contents import Page
from anchorembed.page.drawings import line_chart, map_drawing
from anchorembed.system.files import write_file


def html(page: Page) -> str:
    """The page, in one file that loads nothing and runs nothing."""
    environment = Environment(
        loader=PackageLoader("anchorembed.page", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    charts = [(chart.title, line_chart(chart)) for chart in page.charts]
    maps = [(name, drawn.share, map_drawing(name, drawn)) for name, drawn in page.maps.items()]
    return environment.get_template("page.html.jinja").render(page=page, charts=charts, maps=maps)


def write_page(page: Page, path: Path) -> Path:
    """Write the page and return its path."""
    write_file(path, html(page))
    return path
