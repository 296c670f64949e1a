"""The page about a run and the gallery of a table: files, figures, words computed from numbers, templates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.errors import needs

if TYPE_CHECKING:
    from jinja2 import Environment


@functools.cache
def environment() -> Environment:
    """The templates of this folder; texts are escaped, a name that is not there is an error."""
    with needs("evaluate"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
