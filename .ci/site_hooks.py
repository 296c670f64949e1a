"""What the documentation site needs beside docs/: the root's pages, and links to other files of the repository.

MkDocs calls these functions while it builds (mkdocs.yml, `hooks`). In the repository every link is relative to its
file, so that it works on a code host; a site has only docs/. A link to one of `ROOT_PAGES` leads to its page of the
site, one to any other file outside of docs/ to the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "reporting.md"}
ROOT_PAGES_FROM = {new: old for old, new in ROOT_PAGES.items()}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FENCE = re.compile(r"^(?:```.*?^```|    .*?$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages."""
    for old, new in ROOT_PAGES.items():
        files.append(File.generated(config, new, content=(ROOT / old).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Point links at where they lead on the site."""
    source = page.file.src_uri
    return relinked(markdown, ROOT_PAGES_FROM.get(source, f"docs/{source}"), source, config["repo_url"])


def relinked(markdown: str, written_in: str, shown_as: str, repository: str) -> str:
    """`markdown` of the file `written_in` of the repository with its links as the page `shown_as` of the site needs
    them."""

    def lead(found: re.Match[str]) -> str:
        opened, target, anchor, closed = found[1], found[2], found[3] or "", found[4]
        if re.match(r"[a-z]+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), target))
        if path in ROOT_PAGES:
            place = posixpath.relpath(ROOT_PAGES[path], posixpath.dirname(shown_as) or ".")
        elif path.startswith("docs/") and not path.endswith((".json", ".csv")):
            place = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(shown_as) or ".")
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            place = f"{repository}/{kind}/main/{path}"
        return f"{opened}{place}{anchor}{closed}"

    parts, last = [], 0
    for code in _FENCE.finditer(markdown):
        parts += [_LINK.sub(lead, markdown[last : code.start()]), code[0]]
        last = code.end()
    return "".join([*parts, _LINK.sub(lead, markdown[last:])])
