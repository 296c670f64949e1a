"""Public names of a package that are imported when they are first asked for, so that the package itself costs nothing.

__getattr__, __dir__ = lazy(__name__, {"images": ("load_pixels", "save_image")})
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def lazy(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of `package`: names by the module they live in, and modules."""
    home_of = {name: home for home, names in homes.items() for name in names}

    def find(name: str) -> object:
        if name in modules:
            return importlib.import_module(f".{name}", package)
        if name in home_of:
            return getattr(importlib.import_module(f".{home_of[name]}", package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find, lambda: sorted(sys.modules[package].__all__)
