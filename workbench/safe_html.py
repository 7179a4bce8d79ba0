"""HTML from elsewhere, rebuilt from the tags of prose and tables, so that it can neither run nor fetch anything."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser


def safe_html(source: str) -> str:
    """`source` without scripts, styles and handlers; links lead to pages only, remote pictures become links."""
    rebuilder = _Rebuilder()
    rebuilder.feed(source)
    rebuilder.close()
    return "".join(rebuilder.parts)


class _Rebuilder(HTMLParser):
    """Collects the tags and the text that are allowed, and forgets the rest."""

    TABLE = ("table", "thead", "tbody", "tfoot", "tr", "th", "td", "caption")
    BLOCKS = (
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "p",
        "div",
        "ul",
        "ol",
        "li",
        "pre",
        "blockquote",
        "details",
        "summary",
    )
    INLINE = ("a", "b", "strong", "i", "em", "sub", "sup", "del", "code", "span", "br", "hr")
    TAGS = frozenset((*TABLE, *BLOCKS, *INLINE))
    ATTRIBUTES = frozenset(["colspan", "rowspan", "scope"])
    SILENT = frozenset(["script", "style", "svg", "iframe", "object", "template"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in self.SILENT
        if self.silent:
            return
        given = {name: value or "" for name, value in attrs}
        if tag == "img":
            self.parts.append(_picture(given.get("src", ""), given.get("alt", "")))
        elif tag in self.TAGS:
            kept = {name: value for name, value in given.items() if name in self.ATTRIBUTES}
            if tag == "a" and re.match(r"https?://|#", given.get("href", "")):
                kept["href"] = given["href"]
            words = "".join(f' {name}="{escape(value)}"' for name, value in kept.items())
            self.parts.append(f"<{tag}{words}>")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in self.SILENT))
        if tag in self.TAGS and tag not in ("br", "hr") and not self.silent:
            self.parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(escape(data))


def _picture(source: str, words: str) -> str:
    """A picture that the page holds itself; a link to one that would be fetched."""
    if source.startswith("data:image/"):
        return f'<img src="{escape(source)}" alt="{escape(words)}">'
    return (
        f'<a href="{escape(source)}">{escape(words or source)}</a>' if re.match(r"https?://", source) else escape(words)
    )
