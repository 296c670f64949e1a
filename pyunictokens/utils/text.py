"""Text files that people wrote, on whatever machine: one reader, whatever the editor put in front of the text.

UTF-8 with and without a byte-order mark, and UTF-16 with one (what `>` writes in Windows PowerShell), line ends of any
system. What cannot be read is a UserError that names the file.
"""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

from .errors import UserError
from .spelling import on_disk

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(path: str | os.PathLike[str], largest: int | None = None) -> str:
    """The text in `path`, its lines ended by ``\\n``.

    Raises UserError naming the file: absent, a folder, not permitted, larger than `largest` bytes, not text.
    """
    path = on_disk(Path(path))
    try:
        size = path.stat().st_size
        if largest is not None and size > largest:
            raise UserError(f"{path}: {size} bytes: must be at most {largest}")
        return decode_text(path.read_bytes(), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, must be a file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def printable(text: str) -> str:
    """`text` with every control character but line ends and tabs as its escape: foreign words (of a server, a folder, a
    model) cannot drive the terminal they are printed on."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def spreadsheet_cell(text: str) -> str:
    """`text` as a cell of a CSV file that no spreadsheet takes for a formula: one that begins like a formula gets a '
    in front, as spreadsheets themselves write it."""
    return f"'{text}" if text[:1] in _FORMULA else text


def plain_cell(text: str) -> str:
    """What :func:`spreadsheet_cell` was given."""
    return text[1:] if text[:1] == "'" and text[1:2] in _FORMULA else text


def decode_text(data: bytes, origin: object) -> str:
    """The bytes of a text file as text; `origin` opens the error."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        what = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise UserError(f"{origin}: not {what} text (byte {error.start}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
