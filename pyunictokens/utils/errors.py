"""The two errors a user meets. They carry a sentence that names the value, the limit and the way out; nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class UserError(ValueError):
    """Something a user gave (a file, a flag, a tensor) cannot be used. The command line prints it, no traceback."""


class NotFinite(UserError):
    """A number that must be finite is not. Training leaves the step out and goes on (train/grpo.py)."""


class MissingExtra(ImportError):
    """An optional package is wanted and absent. The message names the command that adds it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of packages that an extra of this package brings: a missing one raises :class:`MissingExtra`.

    with needs("train"):
        from peft import LoraConfig
    """
    try:
        yield
    except ImportError as error:
        if isinstance(error, MissingExtra):
            raise
        name = (error.name or str(error)).partition(".")[0]
        raise MissingExtra(
            f"{name} is needed here and cannot be imported ({error}): pip install 'pyunictokens[{extra}]'"
        ) from error


def require(module: str, extra: str) -> ModuleType:
    """Import `module` by name, or raise :class:`MissingExtra` naming the extra of this package that brings it."""
    with needs(extra):
        return importlib.import_module(module)


class RankLost(UserError):
    """Another process of the same run is gone or has failed, so this one cannot go on."""

    quiet: bool = False
    """Whether another process tells it to the user."""
