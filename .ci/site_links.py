"""Look at a built site: links and pictures lead to files and anchors of it, nothing is loaded from elsewhere.

    python .ci/site_links.py build/site

Links to other sites are not followed. What a browser loads by itself (scripts, styles, pictures) must be in the site.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("source", "srcset"), ("iframe", "src")}


class Page(HTMLParser):
    """The targets and anchors of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[tuple[str, bool]] = []
        """(target, whether a browser loads it by itself)"""
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {str(values[key]) for key in ("id", "name") if values.get(key)}
        if tag == "link":
            loads = "stylesheet" in str(values.get("rel")) or "icon" in str(values.get("rel"))
            self.links += [(str(values["href"]), loads)] if loads and values.get("href") else []
        for key in ("href", "src", "srcset"):
            if tag != "link" and values.get(key):
                self.links.append((str(values[key]), (tag, key) in LOADED))


def problems(site: Path) -> list[str]:
    """What is wrong, a line each."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        if file.name == "404.html":
            continue  # served at any address: its links are absolute
        for target, loads in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if loads and parts.scheme != "data":
                    found.append(f"{file.relative_to(site)} loads {target} from elsewhere")
                continue
            place = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            place = place / "index.html" if place.is_dir() else place
            if not place.is_file():
                found.append(f"{file.relative_to(site)} leads to {target}, which is not there")
            elif parts.fragment and place in pages and unquote(parts.fragment) not in pages[place].anchors:
                found.append(f"{file.relative_to(site)} leads to {target}: no such anchor")
    return found if pages else [f"{site}: holds no pages"]


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]).resolve())
    sys.exit("\n".join(wrong) if wrong else 0)
