"""What a user has trusted, remembered by digest: settings that name code to import, or an address to ask.

Settings in a folder are data: the folder may be a stranger's. Where they name something that would run or be asked over
the network, they are used only if the user gave them on this command line, said `--trust`, or did either before for the
same folder and the very same settings. The memory is a file of the user's own (`$XDG_STATE_HOME/pyunictokens/trusted`,
by default in `~/.local/state`), never a file in the folder that is to be trusted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def memory() -> Path:
    """The file with the digests of what was trusted, one a line."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "pyunictokens" / "trusted"


def digest(folder: str | os.PathLike[str], settings: object) -> str:
    """SHA-256 of where a folder is and of the settings in it that were trusted."""
    words = json.dumps([os.path.realpath(folder), settings], sort_keys=True, default=str)
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def remember(folder: str | os.PathLike[str], settings: object) -> None:
    """Note that these settings of this folder are trusted. A memory that cannot be written is warned of, no more."""
    if trusted(folder, settings):
        return
    file = memory()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as lines:
            lines.write(digest(folder, settings) + "\n")
    except OSError as error:
        log.warning("%s: cannot be written (%s): this run's rewards will want --trust again", file, error.strerror)


def trusted(folder: str | os.PathLike[str], settings: object) -> bool:
    """Whether these settings of this folder were trusted before."""
    try:
        return digest(folder, settings) in memory().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
