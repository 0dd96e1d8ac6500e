"""A parser that checks a page's HTML: every element is closed where it must be."""

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "hr"}  # elements of HTML that have no end


class Balanced(HTMLParser):
    """Fails where an element is closed that is not the innermost open one; ``open`` is what is left at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
