"""What holds of every page: it is whole, needs nothing else, and each of its charts is drawn and has a table."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import vl_convert

from lowbit_core.pages.html import library

VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outside_the_library(page: str) -> str:
    """The page without Vega's script."""
    assert library() in page
    return page.replace(library(), "")


def specs(page: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]


def check_page(page: str) -> None:
    """Whole, alone, small, and every chart is one that Vega-Lite draws, with a table beside it."""
    assert len(page.encode()) <= 5_000_000
    rest = outside_the_library(page)
    parser = Balanced()
    parser.feed(rest)
    assert parser.open == []
    assert not re.search(r"\s(src|href)=|url\(|@import|fetch\(|//cdn", rest)
    assert rest.count("<figure>") == rest.count('<div class="numbers">') >= 1
    for spec in specs(page):
        assert vl_convert.vegalite_to_svg({**spec, "width": 350}).startswith("<svg")
