"""Settings from YAML files and ``key=value`` words into frozen dataclasses, with errors that name the key and a way
out.

A nested dataclass is a section: ``grpo.dsog.mu=0.2`` sets a field of a section of a section. A bare key is enough where
only one section has it. The type of a field decides what a word means: `4e0` is 4 where a whole number is wanted, `no`
is false where true or false is, and both are text where text is. What a setting does is told beside its dataclass.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import os
import re
import textwrap
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ..utils.errors import UserError
from ..utils.files import AnyJson, write_text_atomic
from ..utils.yaml_text import Plain, dump_yaml, meant, parse_yaml, read_yaml, settled

T = TypeVar("T")

Table = dict[str, object]
"""What a settings file holds: sections are tables again; a word without quotes is `Plain` until its type is known."""

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NAMES: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


def from_mapping(cls: type[T], values: object, *, base: T | None = None, origin: str = "settings") -> T:
    """An instance of dataclass `cls` with the mapping `values` put over `base` (or the defaults); `origin` opens each
    error.

    Files and words of older versions are read: a field with ``metadata={"was": OLD}`` also goes by its old name, and a
    setting of ``cls.RETIRED = ((OLD, why), …)`` is left out; a warning says so.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{origin}: must be a table of settings, is {_kind(values)}")
    hints = _hints(cls)
    changes: dict[str, object] = {}
    for key, value in renamed(cls, values, origin).items():
        if key not in hints:
            raise UserError(f"{origin}: {_unknown(str(key), hints)}")
        where = f"{origin}: {key}"
        if _is_section(hints[key]) and isinstance(value, Mapping):
            inner = getattr(base, key) if base is not None else None
            changes[key] = from_mapping(cast(type, hints[key]), value, base=inner, origin=where)
        else:
            changes[key] = convert(value, hints[key], where)
    if base is None:
        needed = [each.name for each in _fields(cls) if each.default is each.default_factory is MISSING]
        missing = [name for name in needed if name not in changes]
        if missing:
            raise UserError(f"{origin}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    try:
        return cls(**changes) if base is None else cast(T, replace(cast(Any, base), **changes))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


def old_names(cls: type) -> dict[str, str]:
    """Settings of a dataclass by the names they had in older versions (``field(metadata={"was": …})``)."""
    return {each.metadata["was"]: each.name for each in _fields(cls) if "was" in each.metadata}


def renamed(cls: type, values: Mapping[str, object], origin: str = "") -> Table:
    """`values` without retired settings, and with those of older versions under their present names.

    With `origin` what it did is said, and sections are left to :func:`from_mapping`; without, sections are done too.
    Raises UserError where both names are there.
    """
    old, gone, hints, found = old_names(cls), dict(vars(cls).get("RETIRED", ())), _hints(cls), Table()
    for key, value in values.items():
        if key in gone:
            if origin and value is not None:
                warnings.warn(f"{origin}: setting {key} is left out: {gone[key]}", stacklevel=3)
            continue
        name = old.get(key, key)
        if name != key and name in values:
            raise UserError(f"{origin or cls.__name__}: {key} is the old name of {name}: give one of the two")
        if name != key and origin:
            warnings.warn(f"{origin}: setting {key} is now called {name}", stacklevel=3)
        section = hints.get(name)
        nested = not origin and _is_section(section) and isinstance(value, Mapping)
        found[name] = renamed(cast(type, section), cast("Table", value)) if nested else value
    return found


def with_overrides(settings: T, words: Iterable[str]) -> T:
    """A copy of `settings` with ``key=value`` words applied in order; keys may name sections by dots."""
    tree: Table = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{word!r}: must have the form key=value, for example grpo.steps=20")
        node, *path = tree, *find_key(type(settings), key.strip())
        for part in path[:-1]:
            node = cast(Table, node.setdefault(part, {}))
        node[path[-1]] = _word(text.strip(), word)
    return from_mapping(type(settings), tree, base=settings, origin="override")


def find_key(cls: type, key: str) -> list[str]:
    """The path of a dotted or bare key in dataclass `cls`. Raises UserError with the nearest name, or all that fit."""
    paths = leaves(cls)
    for known in (paths, _former(cls)):
        if key in known:
            return key.split(".")
        found = [path for path in known if path.endswith("." + key)]
        if len(found) == 1:
            return found[0].split(".")
        if found:
            raise UserError(f"override: {key!r} is a setting of several sections: write one of {', '.join(found)}")
    raise UserError(f"override: {_unknown(key, paths)}")


def leaves(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings of dataclass `cls`."""
    names: list[str] = []
    for name, hint in _hints(cls).items():
        names += leaves(cast(type, hint), f"{prefix}{name}.") if _is_section(hint) else [prefix + name]
    return names


def _former(cls: type, prefix: str = "") -> list[str]:
    """Dotted names that settings of `cls` had in older versions, of those that are gone too."""
    names = [prefix + name for name in (*old_names(cls), *dict(vars(cls).get("RETIRED", ())))]
    for name, hint in _hints(cls).items():
        names += _former(cast(type, hint), f"{prefix}{name}.") if _is_section(hint) else []
    return names


def _fields(settings: object) -> tuple[Field[object], ...]:
    """Fields of a dataclass or an instance of one."""
    return fields(cast(Any, settings))


def _hints(cls: type) -> Mapping[str, object]:
    """Types of the fields of dataclass `cls`."""
    return _looked_up(cls)


@functools.cache  # Python compiles each annotation anew, and a run's settings are read many times
def _looked_up(cls: type) -> Mapping[str, object]:
    hints = typing.get_type_hints(cls)
    return types.MappingProxyType({each.name: hints[each.name] for each in _fields(cls)})


def _is_section(hint: object) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def convert(value: object, hint: object, where: str) -> object:
    """`value` as type `hint`, or UserError naming both.

    hint: bool, int, float, str, Path (`~` is the home folder), Literal, tuple[X, ...], Mapping[str, X], a dataclass,
    X | Y (the first that fits), or object for any value. Text from YAML, from words and from JSON is read alike.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, arguments, where)
    if origin is typing.Literal:
        for argument in arguments:
            if value == argument or (isinstance(value, Plain) and meant(value) == argument):
                return argument
        raise UserError(f"{where}={_shown(value)}: must be one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise UserError(f"{where}={_shown(value)}: must be a list")
        return tuple(convert(item, arguments[0], where) for item in items)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={_shown(value)}: must be a table")
        return {str(key): convert(each, arguments[1], f"{where}.{key}") for key, each in value.items()}
    if _is_section(hint):
        return from_mapping(cast(type, hint), cast("Mapping[str, object]", value), origin=where)
    if hint is object:
        return settled(value)
    made = _plain_value(value, hint)
    if made is None:
        null = " (null is no text: write it in quotes)" if value is None and hint is str else ""
        raise UserError(f"{where}={_shown(value)}: must be {_NAMES.get(hint, hint)}{null}")
    return made


def _one_of(value: object, kinds: tuple[object, ...], where: str) -> object:
    if type(None) in kinds and (value is None or value == "none"):
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds[:-1]:
        try:
            return convert(value, kind, where)
        except UserError:
            continue
    return convert(value, kinds[-1], where)


def _plain_value(value: object, hint: object) -> bool | int | float | str | Path | None:
    """`value` as one of the simple types; None where it is none."""
    if hint is str and not isinstance(value, bool) and isinstance(value, (str, int, float)):
        return str(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value).expanduser()
    if hint is bool:
        return _BOOLS.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None
    if hint not in (int, float) or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    number = _number(value) if isinstance(value, str) else value
    if hint is float or number is None:
        return None if number is None else float(number)
    return int(number) if isinstance(number, int) or (math.isfinite(number) and number.is_integer()) else None


def _number(text: str) -> int | float | None:
    """`1e-6`, `4e0`, `1_000`, `.5`, `-.inf`, `nan`; None for what is no number."""
    digits = text.replace("_", "")
    if re.fullmatch(r"[-+]?[0-9]{1,300}", digits):
        return int(digits)
    try:
        return float(re.sub(r"\.(?=inf|nan)", "", digits.lower()))
    except ValueError:
        return None


def to_mapping(settings: object) -> dict[str, AnyJson]:
    """A settings dataclass as plain dicts and lists, in the order of its fields."""
    return {each.name: _as_plain(getattr(settings, each.name)) for each in _fields(settings)}


def _as_plain(value: object) -> object:
    if is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {str(key): _as_plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_as_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def filled(settings: object, defaults: Mapping[str, object]) -> object:
    """Stored `settings` of an older version, with what it did not know yet at its default: what was done before."""
    if not isinstance(settings, Mapping):
        return settings
    inner = {
        key: filled(value, section)
        for key, value in settings.items()
        if isinstance(section := defaults.get(key), Mapping)
    }
    return {**defaults, **settings, **inner}


def load_yaml(path: str | os.PathLike[str]) -> Table:
    """The table in a YAML file; an empty file is an empty table. Raises UserError naming file and line."""
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{Path(path)}: must hold a table of settings, holds {_kind(content)}")
    return content


def save_yaml(path: str | os.PathLike[str], settings: object) -> None:
    """Write a settings dataclass, or a table, as YAML, whole or not at all."""
    write_text_atomic(path, dump_yaml(to_mapping(settings) if is_dataclass(settings) else _as_plain(settings)))


def _word(text: str, word: str) -> object:
    """The value of a ``key=value`` word: a list, table or quoted text as YAML has it, else the word as it stands."""
    if text[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text, repr(word))
    return None if text in ("null", "~") else Plain(text)


def _shown(value: object) -> str:
    text = repr(settled(value))
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text)} characters)"


def _kind(value: object) -> str:
    return {list: "a list", Plain: "text", type(None): "nothing"}.get(type(value), type(value).__name__)


def _unknown(key: str, known: Iterable[str]) -> str:
    known = list(known)
    short = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        short[name] for name in difflib.get_close_matches(key.rpartition(".")[2], short, n=1)
    ]
    return f"unknown setting {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


@dataclass(frozen=True)
class Setting:
    """One setting as documentation shows it."""

    name: str
    default: object
    about: str


def describe(settings: object, prefix: str = "") -> list[Setting]:
    """All settings of a dataclass instance with the docstrings under their fields, in order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(settings)))).body[0]
    assert isinstance(tree, ast.ClassDef)
    about: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            about[field.target.id] = " ".join(str(text.value.value).split())
    found: list[Setting] = []
    for each in _fields(settings):
        value = getattr(settings, each.name)
        if is_dataclass(value):
            found += describe(value, f"{prefix}{each.name}.")
        else:
            found.append(Setting(prefix + each.name, value, about[each.name]))
    return found
