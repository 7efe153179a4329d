"""A page of HTML as its reader meets it: tags, words, scripts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any


class Reader(HTMLParser):
    """What a page is made of; figures: the charts of a report."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Every tag with its attributes."""
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(dict(attrs).get("id") or tag)

    def handle_endtag(self, tag: str) -> None:
        """Out of a script or a style."""
        if tag in ("script", "style"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        """Words that people read, or a script's text."""
        if self.inside:
            self.scripts[self.inside[-1]] = self.scripts.get(self.inside[-1], "") + data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        """All words."""
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def figures(self) -> list[dict[str, Any]]:
        """The charts."""
        return json.loads(self.scripts["figures"])["figures"]
