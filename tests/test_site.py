"""The documentation site: links are led where the site has them, every page stands in its navigation, and what is wrong
in a built site is found. The site itself is built by `make docs`, a step of .ci/run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://code.example/owner/name"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("written", "page", "target", "wanted"),
    [
        ("docs/tour.md", "tour.md", "toyworld.md", "toyworld.md"),
        ("docs/tour.md", "tour.md", "toyworld.md#the-world", "toyworld.md#the-world"),
        ("docs/tour.md", "tour.md", "../CONTRIBUTING.md", "contributing.md"),
        ("docs/tour.md", "tour.md", "../examples/trl_trainer.py", f"{REPOSITORY}/blob/main/examples/trl_trainer.py"),
        ("docs/tour.md", "tour.md", "../csrc", f"{REPOSITORY}/tree/main/csrc"),
        ("docs/tour.md", "tour.md", "demo.json", f"{REPOSITORY}/blob/main/docs/demo.json"),
        ("docs/api/ops.md", "api/ops.md", "../ops.md", "../ops.md"),
        ("CONTRIBUTING.md", "contributing.md", "docs/rewards.md", "rewards.md"),
        ("CONTRIBUTING.md", "contributing.md", "LICENSE", f"{REPOSITORY}/blob/main/LICENSE"),
        ("docs/tour.md", "tour.md", "https://elsewhere.example/x", "https://elsewhere.example/x"),
    ],
)
def test_a_link_leads_where_the_site_has_it(written: str, page: str, target: str, wanted: str) -> None:
    pytest.importorskip("mkdocs")
    hooks = script("site_hooks")
    assert hooks.relinked(f"see [this]({target}) now", written, page, REPOSITORY) == f"see [this]({wanted}) now"
    code = f"```\n[this]({target})\n```\n"
    assert hooks.relinked(code, written, page, REPOSITORY) == code, "code is left alone"


def test_every_page_stands_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = set(re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE))
    pages = {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}
    pytest.importorskip("mkdocs")
    assert listed == pages | set(script("site_hooks").ROOT_PAGES.values())


def test_everything_public_that_the_reference_shows_exists() -> None:
    for page in (ROOT / "docs" / "api").glob("*.md"):
        names = re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert names
        for name in names:
            module, _, attribute = name.rpartition(".")
            assert getattr(importlib.import_module(module), attribute).__doc__, f"{page.name}: {name}"


def test_what_is_wrong_in_a_built_site_is_found(tmp_path: Path) -> None:
    problems = script("site_links").problems
    (tmp_path / "more").mkdir()
    (tmp_path / "index.html").write_text('<h2 id="here"></h2><a href="more/#there">m</a><a href="#here">h</a>')
    (tmp_path / "more" / "index.html").write_text('<p id="there"><a href="..">up</a><a href="https://x.example">x</a>')
    assert problems(tmp_path) == []
    (tmp_path / "more" / "index.html").write_text(
        '<a href="gone.html">g</a><a href="../#nowhere">n</a><img src="https://x.example/i.png">'
    )
    assert problems(tmp_path) == [
        "index.html leads to more/#there: no such anchor",
        "more/index.html leads to gone.html, which is not there",
        "more/index.html leads to ../#nowhere: no such anchor",
        "more/index.html loads https://x.example/i.png from elsewhere",
    ]
    assert problems(tmp_path / "none") and "holds no pages" in problems(tmp_path / "none")[0]
