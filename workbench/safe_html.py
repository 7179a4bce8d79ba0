"""HTML from elsewhere, rebuilt from the tags of prose and tables, so that it can neither run nor fetch anything.

Of styles those are left that colour and frame a token of a text, with numbers and colours as their only values.
"""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser

_COLOUR, _PIXELS = r"#[0-9A-Fa-f]{6}", r"\d{1,2}(?:px)?(?: \d{1,2}(?:px)?){0,3}"
STYLES = {
    "background-color": _COLOUR,
    "color": _COLOUR,
    "border": rf"\d{{1,2}}px (?:solid|dashed) (?:{_COLOUR}|transparent)",
    "padding": _PIXELS,
    "margin": _PIXELS,
    "margin-top": _PIXELS,
    "line-height": r"\d(?:\.\d+)?",
    "text-decoration": "line-through",
    "display": "inline-block",
    "max-width": "100%",
    "overflow-wrap": "anywhere|break-word",
    "print-color-adjust": "exact",
}


def safe_html(source: str) -> str:
    """`source` without scripts, style sheets and handlers; links lead to pages only, remote pictures become links."""
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
        "section",
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
    ATTRIBUTES = frozenset(["colspan", "rowspan", "scope", "title", "role", "aria-label"])
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
            if style := _style(given.get("style", "")):
                kept["style"] = style
            if re.fullmatch(r"workbench-[a-z-]+", given.get("class", "")):
                kept["class"] = given["class"]
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


def _style(source: str) -> str:
    """The declarations of a style attribute that are allowed, with the values that are."""
    pairs = (part.partition(":")[::2] for part in source.split(";"))
    named = ((name.strip().lower(), value.strip()) for name, value in pairs)
    return ";".join(f"{name}:{value}" for name, value in named if name in STYLES and re.fullmatch(STYLES[name], value))


def _picture(source: str, words: str) -> str:
    """A picture that the page holds itself; a link to one that would be fetched."""
    if source.startswith("data:image/"):
        return f'<img src="{escape(source)}" alt="{escape(words)}">'
    return (
        f'<a href="{escape(source)}">{escape(words or source)}</a>' if re.match(r"https?://", source) else escape(words)
    )
