"""The two errors a user meets. They carry a sentence that names the value, the limit and the way out; nothing else."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(ValueError):
    """Something a user gave (a file, a flag, a tensor) cannot be used. The command line prints it, no traceback."""


class MissingExtra(ImportError):
    """An optional package is wanted and absent. The message names the command that adds it."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise :class:`MissingExtra` naming the extra of this package that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        raise MissingExtra(
            f"{top} is needed here and cannot be imported ({error}): pip install 'pyunictokens[{extra}]'"
        ) from error


class RankLost(UserError):
    """Another process of the same run is gone or has failed, so this one cannot go on."""

    quiet: bool = False
    """Whether another process tells it to the user."""
