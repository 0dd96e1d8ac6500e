"""Draw docs/journey.svg, the picture in the README: python docs/journey.py.

Each stage is a row of boxes joined by arrows. The colours follow the reader's light or dark mode, and the picture has
its own background, so that it is readable on any page.
"""

from pathlib import Path
from xml.sax.saxutils import escape

Row = tuple[str, str, str, str, str]

STAGES: dict[str, list[Row]] = {
    "Stage I: from the vector alone, the same LLM writes the other side of the pair": [
        ("query", "LLM", "[EOS] vector", "same LLM", "document"),
        ("document", "LLM", "[EOS] vector", "same LLM", "query"),
    ],
    "Stage II: vectors of a pair move together, all others apart": [
        ("pairs", "LLM", "[EOS] vectors", "contrastive loss", "embedder"),
    ],
    "Search: the stored vectors nearest to the query's": [
        ("query", "embedder", "[EOS] vector", "nearest vectors", "documents"),
    ],
}
TITLE = "A query and a document become EOS vectors in Stage I, in contrastive learning and in search"
WIDTH, MARGIN, GAP = 780, 20, 25
BOX, HEIGHT, STEP = 128, 40, 54
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .title { font-weight: 600; text-anchor: start }
  .page { fill: #ffffff }
  .box { fill: #eef2f6; stroke: #8c959f }
  .vector { fill: #dbeafe; stroke: #2563eb }
  .arrow { stroke: #59636e; stroke-width: 1.5; fill: none; marker-end: url(#head) }
  #head path { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .page { fill: #0d1117 }
    .box { fill: #1c2430; stroke: #6e7681 }
    .vector { fill: #12305f; stroke: #58a6ff }
    .arrow { stroke: #9198a1 }
    #head path { fill: #9198a1 }
  }
"""


def boxes(row: Row, top: int) -> list[str]:
    """Boxes of a row whose upper edge is at ``top``, each but the last with an arrow to the next."""
    lines: list[str] = []
    for column, label in enumerate(row):
        left, middle = MARGIN + column * (BOX + GAP), top + HEIGHT // 2
        shape, corner = ("vector", HEIGHT // 2) if "[EOS]" in label else ("box", 6)
        lines.append(f'<rect class="{shape}" x="{left}" y="{top}" width="{BOX}" height="{HEIGHT}" rx="{corner}"/>')
        lines.append(f'<text x="{left + BOX // 2}" y="{middle + 5}">{escape(label)}</text>')
        if column < len(row) - 1:
            lines.append(f'<path class="arrow" d="M{left + BOX + 2} {middle} h{GAP - 6}"/>')
    return lines


def drawing() -> str:
    """The whole picture as SVG."""
    lines: list[str] = []
    top = MARGIN
    for title, rows in STAGES.items():
        lines.append(f'<text class="title" x="{MARGIN}" y="{top + 14}">{escape(title)}</text>')
        top += 28
        for row in rows:
            lines += boxes(row, top)
            top += STEP
        top += 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" aria-label="{TITLE}">',
        f"<title>{TITLE}</title>",
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker>',
        f'<rect class="page" width="{WIDTH}" height="{top}" rx="8"/>',
    )
    return "\n".join((*head, *lines, "</svg>")) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing(), encoding="utf-8")
