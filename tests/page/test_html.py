"""The page is whole, loads nothing, and fits a browser, narrow and wide, in light and in dark."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from anchorembed.page.contents import Page
from anchorembed.page.html import html, write_page
from balanced import Balanced

EVIL = '<b>&"'  # in the texts of the run
pytestmark = pytest.mark.slow


def test_the_page_is_whole_and_alone(page: Page) -> None:
    text = html(page)
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.tags.count("svg") == 7
    assert "script" not in parser.tags
    assert not re.search(r"(src|href)\s*=|url\(|@import", text)
    assert "default-src 'none'" in text
    assert EVIL not in text
    assert text == html(page)
    for name, row in page.rows.items():
        assert f"<th>{name}</th><td>{row['nDCG@10']:.3f}</td>" in text
    for reading in page.readings.values():
        assert reading.verdict.split(":")[0] in text


PROBE = """<script>document.title = JSON.stringify({inner: innerWidth, scroll: document.documentElement.scrollWidth,
page: getComputedStyle(document.body).backgroundColor, text: getComputedStyle(document.querySelector('svg text')).fill,
widths: [...document.querySelectorAll('svg')].map(e => Math.round(e.getBoundingClientRect().width)),
columns: new Set([...document.querySelectorAll('.chart')].map(e => e.offsetLeft)).size})</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here; CI installs it")
@pytest.mark.parametrize(("width", "columns"), [(500, 1), (1300, 2)])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it(page: Page, tmp_path: Path, width: int, columns: int, dark: bool) -> None:
    probe = tmp_path / "probe.html"
    text = html(page).replace("</body>", PROBE)
    probe.write_text(re.sub("<meta http-equiv=.*", "", text), encoding="utf-8")  # which lets no script run
    browser = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--window-size={width},1200", f"--user-data-dir={tmp_path / 'profile'}"),
        f"--blink-settings=preferredColorScheme={int(not dark)}",
    ]
    shown = subprocess.run(
        [*browser, "--dump-dom", probe.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    title = re.search("<title>(.*?)</title>", shown.stdout)
    assert title is not None
    seen = json.loads(title[1])
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["columns"] == columns
    assert len(seen["widths"]) == 7
    assert min(seen["widths"]) > 150
    assert max(seen["widths"]) <= width
    assert (seen["page"], seen["text"]) == (
        ("rgb(22, 24, 27)", "rgb(238, 238, 238)") if dark else ("rgb(255, 255, 255)", "rgb(17, 17, 17)")
    )


def test_the_page_is_written_whole(page: Page, tmp_path: Path) -> None:
    assert write_page(page, tmp_path / "page.html").read_text(encoding="utf-8") == html(page)
