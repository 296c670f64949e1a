"""Files that are either whole or absent: write aside in the same folder, flush to disk, rename.

Also the lock on a folder, the reading of JSON with errors that name file and position, and the one check for names that
come from data and are about to become a path.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch

from .errors import UserError, needs
from .text import read_text

log = logging.getLogger(__name__)

AnyJson: TypeAlias = Any
"""What was read from JSON, before anybody has looked at what it is (`utils.json.Json` says what it can be)."""

_NAME_LIMIT = 64
_DIGITS = 300
"""Digits of a whole number that a float still holds."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
LOCKS = (".lock", ".pipeline.lock")
"""Files that runs lock in their folders."""

_PART = re.compile(r"\..*\.part")
_CHECKSUM = "tensors_sha256"
_SEAL = "sha256"
_LFS_POINTER = b"version https://git-lfs"


def write_bytes_atomic(path: str | os.PathLike[str], *data: bytes | memoryview) -> None:
    """Write `data`, one part after the other, to `path`. A kill or a full disk leaves the old file untouched and no
    half-written one behind.

    An OSError names `path`, also where the system names nothing (no space left).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_errors(path):
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o666 & ~_umask())
            os.replace(aside, path)
            sync_folder(path.parent)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Have the names in a folder on disk: after a rename, the new name outlives a power cut only then."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot, and say so
            raise
    finally:
        os.close(descriptor)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """:func:`write_bytes_atomic` for text, as UTF-8; half characters, as in file names that are no text, become ?."""
    write_bytes_atomic(path, text.encode("utf-8", "replace"))


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_rows(path: str | os.PathLike[str], value: Mapping[str, object]) -> None:
    """Write JSON with each item of the lists and tables in `value` on a line of its own: results of many records."""

    def line(item: object) -> str:
        return json.dumps(item, ensure_ascii=False)

    def part(item: object) -> str:
        if isinstance(item, list) and item:
            return "[\n  " + ",\n  ".join(map(line, item)) + "\n ]"
        if isinstance(item, Mapping) and item:
            return "{\n  " + ",\n  ".join(f"{line(str(key))}: {line(inner)}" for key, inner in item.items()) + "\n }"
        return line(item)

    write_text_atomic(path, "{\n" + ",\n".join(f" {line(key)}: {part(item)}" for key, item in value.items()) + "\n}\n")


def save_safetensors_atomic(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device; made contiguous on the CPU) as safetensors, whole or not at all.

    The file carries the checksum of its tensors, which :func:`verify_safetensors` holds it against. The same tensors
    and metadata give the same bytes: the library writes metadata in an order that changes from call to call.
    """
    with needs("train"):
        from safetensors.torch import save

    flat = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    data = memoryview(save(flat, metadata={**(metadata or {}), _CHECKSUM: tensors_checksum(flat)}))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    write_bytes_atomic(path, len(ordered.ljust(size)).to_bytes(8, "little"), ordered.ljust(size), data[8 + size :])


def tensors_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors on the CPU, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sealed(table: Mapping[str, object]) -> dict[str, object]:
    """`table` with a checksum of all that it says, which :func:`unsealed` holds it against."""
    return {**table, _SEAL: _seal(table)}


def unsealed(table: Mapping[str, object], origin: object) -> dict[str, AnyJson]:
    """`table`, read from JSON, without its checksum. Raises UserError where it has one that does not fit; tables of
    earlier versions have none."""
    plain = {key: value for key, value in table.items() if key != _SEAL}
    if _SEAL in table and table[_SEAL] != _seal(plain):
        raise UserError(f"{origin}: is damaged (its checksum does not fit): take a copy, or make it again")
    return plain


def _seal(table: Mapping[str, object]) -> str:
    plain = json.loads(json.dumps(table))  # as it will be read: keys are text
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, mapped into memory. Raises UserError where it is missing or damaged, or does
    not have the checksum that it carries."""
    with needs("train"):
        from safetensors.torch import load_file

    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except Exception as error:  # whatever a reader stumbles over
        refuse_lfs_pointer(path)
        raise UserError(f"{path}: not a whole safetensors file: {error}") from error
    verify_safetensors(path, tensors)
    return tensors


def verify_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError where the file carries a checksum and `tensors`, read from it, do not have it."""
    with needs("train"):
        from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        wanted = (file.metadata() or {}).get(_CHECKSUM)
    if wanted is not None and wanted != tensors_checksum(tensors):
        raise UserError(f"{path}: is damaged (its checksum does not fit): take a copy, or make it again")


def sweep(folder: str | os.PathLike[str], *, inside: bool = True) -> None:
    """Delete what killed processes were writing aside in `folder`, and `inside` its folders. Hold its lock, or files at
    work are lost.

    A folder inside that somebody else holds (another run, in the folder of many) is left as it is.
    """
    for place, folders, files in os.walk(folder):
        if not inside:
            folders.clear()
        for name in list(folders):
            path = Path(place, name)
            if _PART.fullmatch(name):
                shutil.rmtree(path, ignore_errors=True)
            if _PART.fullmatch(name) or _held(path):
                folders.remove(name)
        for name in files:
            if _PART.fullmatch(name):
                Path(place, name).unlink(missing_ok=True)


def _held(folder: Path) -> bool:
    """Whether another process holds the lock of `folder`, if it has one."""
    for name in LOCKS:
        if not (folder / name).is_file():
            continue
        try:
            with folder_lock(folder, name):
                pass
        except (UserError, OSError):
            return True
    return False


def refuse_unwritable(file: str | os.PathLike[str]) -> None:
    """Make the folder that `file` will be written into, and raise an OSError that names it where nothing can be written
    there: ahead of hours of work."""
    folder = Path(file).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(prefix=".", suffix=".part", dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


@contextmanager
def named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError inside names `path` where the system names nothing (no space left, file too large)."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def folder_lock(folder: str | os.PathLike[str], name: str = ".lock", wait: float = 0.0) -> Iterator[bool]:
    """Hold `folder` for this process alone while the context lasts. Raises UserError when another one has it.

    name: the file that is locked; "" locks the folder itself and leaves no file behind. wait: seconds to wait for
    another one. The system lets go when the process ends, however it ends. Where locks are not known (Windows, some
    network file systems) a warning says that nothing is held, and the context is given False.
    """
    try:
        import fcntl
    except ImportError:
        log.warning("%s: this system knows no file locks: see that one process alone works here", folder)
        yield False
        return
    place, flags = (Path(folder) / name, os.O_RDWR | os.O_CREAT) if name else (Path(folder), os.O_RDONLY)
    descriptor, end, held = os.open(place, flags, 0o666), time.monotonic() + wait, True
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.05)
                    continue
                raise UserError(f"{folder}: another process is working in this folder") from None
            except OSError as error:
                held = False
                log.warning("%s: cannot be locked (%s): see that one process alone works here", folder, error.strerror)
            break
        yield held
    finally:
        os.close(descriptor)


def read_json(path: str | os.PathLike[str], halves: bool = False) -> AnyJson:
    """Read a JSON file. Raises UserError naming the file, and for bad JSON the line and column.

    halves: let half characters (lone surrogates) pass; for a caller that looks for them and says where they are.
    """
    text = read_text(path)
    try:
        return parse_json(text, halves)
    except json.JSONDecodeError as error:
        refuse_lfs_pointer(path)
        raise UserError(f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply") from None
    except ValueError as error:  # a number of hundreds of digits, half a character
        raise UserError(f"{path}: not usable JSON: {error}") from None


def read_json_table(path: str | os.PathLike[str]) -> dict[str, AnyJson]:
    """What :func:`read_json` reads where that is a table of names. Raises UserError naming the file where it is not."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a table, is {type(found).__name__}")
    return found


def read_table_or_warn(path: str | os.PathLike[str], otherwise: str) -> dict[str, object]:
    """The table in a JSON file that a run can do without; {} where there is no file, and with a warning, which says
    what is done `otherwise`, where it is damaged."""
    if not Path(path).exists():
        return {}
    try:
        return read_json_table(path)
    except UserError as error:
        log.warning("%s: %s", error, otherwise)
        return {}


def parse_json(text: str, halves: bool = False) -> AnyJson:
    """The value of a JSON text. Raises ValueError also for what would break those who use it later: a whole number of
    more digits than a float holds, half of a character (a lone surrogate), which no file and no terminal takes."""
    value = json.loads(text, parse_int=_int)
    if not halves and _HALF.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError is a ValueError
    return value


def _int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, AnyJson]]:
    """The tables of a log, one a line; a line that a kill cut off, or that damage left, is passed over."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = parse_json(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def refuse_lfs_pointer(path: str | os.PathLike[str]) -> None:
    """Raise UserError where `path`, or a file in the folder `path`, is what Git leaves of a large file that Git LFS has
    not fetched; else do nothing."""
    path = Path(path)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        try:
            with open(file, "rb") as opened:
                start = opened.read(len(_LFS_POINTER))
        except OSError:
            continue
        if start == _LFS_POINTER:
            raise UserError(f"{file}: a Git LFS pointer, not the file itself: run `git lfs pull` in its repository")


def unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    """Why weights at `path` (a file or a folder) could not be read, for the end of an error: what the library that
    stumbled says, but for its advice to let the file run code. Raises UserError where a Git LFS pointer is the cause.
    """
    refuse_lfs_pointer(path)
    if "weights_only" in str(error):
        return (
            "it is damaged, or holds Python objects besides tensors, which could run code: save the state dict alone, "
            "best as safetensors"
        )
    return f"{type(error).__name__}: {error}"


def safe_name(name: str, what: str = "name") -> str:
    """Return `name` if it can be one part of a path, else raise UserError. Letters of any script are fine."""
    bad = (
        not isinstance(name, str)
        or not name.strip()
        or name in {".", ".."}
        or name.startswith(("-", "."))
        or len(name) > _NAME_LIMIT
        or any(character in '/\\<>:"|?*' or not character.isprintable() for character in name)
    )
    if bad:
        raise UserError(
            f'{what} {name!r}: must be 1 to {_NAME_LIMIT} printable characters without / \\ < > : " | ? * '
            "and must not start with '-' or '.'"
        )
    return name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
