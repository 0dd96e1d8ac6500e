"""Hook of mkdocs: what was measured, in results/ and speed/, is shown on the site from where it lies."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MEASURED = [*sorted(ROOT.glob("results/**/*.md")), *sorted(ROOT.glob("results/**/*.svg")), ROOT / "speed" / "NOTES.md"]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and figures of what was measured, under the paths they have in the repository."""
    for path in MEASURED:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ into results/ and speed/ lead to those pages."""
    return re.sub(r"\]\(\.\./(results|speed)/", r"](\1/", markdown) if "/" not in page.file.src_uri else markdown
