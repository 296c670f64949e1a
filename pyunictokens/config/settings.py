"""Settings from YAML files and ``key=value`` words into frozen dataclasses, with errors that name the key and a way
out.

A nested dataclass is a section: ``grpo.dsog.mu=0.2`` sets a field of a section of a section. A bare key is enough where
only one section has it. What the settings mean is said where their dataclasses stand (training.py).
"""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import textwrap
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..utils.errors import UserError
from ..utils.files import write_text_atomic

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], *, base: T | None = None, origin: str = "settings") -> T:
    """An instance of dataclass `cls` with `values` put over `base` (or the defaults); `origin` opens each error."""
    if not isinstance(values, Mapping):
        raise UserError(f"{origin}: must be a table of settings, is {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    changes: dict[str, Any] = {}
    for key, value in renamed(cls, values, origin).items():
        if key not in hints:
            raise UserError(f"{origin}: {_unknown(str(key), hints)}")
        where = f"{origin}: {key}"
        if is_dataclass(hints[key]):
            inner = getattr(base, key) if base is not None else None
            changes[key] = from_mapping(hints[key], value, base=inner, origin=where)
        else:
            changes[key] = convert(value, hints[key], where)
    return cls(**changes) if base is None else replace(base, **changes)  # type: ignore[type-var]


def old_names(cls: Any) -> dict[str, str]:
    """Settings of a dataclass by the names they had in older versions (``field(metadata={"was": …})``)."""
    return {each.metadata["was"]: each.name for each in fields(cls) if "was" in each.metadata}


def renamed(cls: Any, values: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
    """`values` with settings of older versions under their present names, in sections too. Says so where `origin` is
    given. Raises UserError where both names are there."""
    old, hints, found = old_names(cls), typing.get_type_hints(cls), {}
    for key, value in values.items():
        name = old.get(key, key)
        if name != key:
            if name in values:
                raise UserError(f"{origin or cls.__name__}: {key} is the old name of {name}: give one of the two")
            if origin:
                warnings.warn(f"{origin}: setting {key} is now called {name}", stacklevel=3)
        inner = hints.get(name)
        nested = not origin and is_dataclass(inner) and isinstance(value, Mapping)
        found[name] = renamed(inner, value) if nested else value
    return found


def with_overrides(settings: T, words: Iterable[str]) -> T:
    """A copy of `settings` with ``key=value`` words applied in order; keys may name sections by dots."""
    tree: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{word!r}: must have the form key=value, for example grpo.steps=20")
        node, *path = tree, *find_key(type(settings), key.strip())
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = _parse(text.strip(), word)
    return from_mapping(type(settings), tree, base=settings, origin="override")


def find_key(cls: type, key: str) -> list[str]:
    """The path of a dotted or bare key in dataclass `cls`. Raises UserError with the nearest name, or all that fit."""
    paths = leaves(cls)
    section, _, last = key.rpartition(".")
    for path in paths:  # a name of an older version
        home, _, name = path.rpartition(".")
        if old_names(_section(cls, home)).get(last) == name and section in ("", home):
            return [*home.split("."), last] if home else [last]  # from_mapping gives it its present name
    if key in paths:
        return key.split(".")
    found = [path for path in paths if path.endswith("." + key)]
    if len(found) == 1:
        return found[0].split(".")
    if found:
        raise UserError(f"override: {key!r} is a setting of several sections: write one of {', '.join(found)}")
    raise UserError(f"override: {_unknown(key, paths)}")


def _section(cls: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        cls = typing.get_type_hints(cls)[name]
    return cls


def leaves(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings of dataclass `cls`."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        names += leaves(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]
    return names


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as type `hint` (bool, int, float, str, Literal, tuple[X, ...], X | None), or UserError naming both."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where}={value!r}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise UserError(f"{where}={value!r}: must be a list")
        return tuple(convert(item, arguments[0], where) for item in items)
    if type(None) in arguments:
        if value is None or value == "none":
            return None
        return convert(value, next(kind for kind in arguments if kind is not type(None)), where)
    if hint is bool and isinstance(value, bool):
        return value
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if hint is int and whole and not isinstance(value, bool):
        return int(value)
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 takes 1e-6, without a point, for text
            return float(value)
        except (TypeError, ValueError):
            pass
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise UserError(f"{where}={value!r}: must be {names.get(hint, hint)}")


def to_mapping(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain dicts and lists, in the order of its fields."""
    plain: dict[str, Any] = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        if is_dataclass(value):
            value = to_mapping(value)
        plain[each.name] = list(value) if isinstance(value, tuple) else value
    return plain


def filled(settings: Any, defaults: Mapping[str, Any]) -> Any:
    """Stored `settings` of an older version, with what it did not know yet at its default: what was done before."""
    if not isinstance(settings, Mapping):
        return settings
    sections = {key: value for key, value in settings.items() if isinstance(defaults.get(key), dict)}
    inner = {key: filled(value, defaults[key]) for key, value in sections.items()}
    return {**defaults, **settings, **inner}


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table in a YAML file; an empty file is an empty table. Raises UserError naming file and line."""
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, must be a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}: not valid YAML{line}: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a table of settings, holds {type(content).__name__}")
    return content


def save_yaml(path: str | os.PathLike[str], settings: Any) -> None:
    """Write a settings dataclass as YAML, whole or not at all."""
    import yaml

    write_text_atomic(path, yaml.safe_dump(to_mapping(settings), sort_keys=False, allow_unicode=True))


def _parse(text: str, word: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise UserError(f"{word!r}: the value is not valid YAML: {getattr(error, 'problem', error)}") from None


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
    default: Any
    about: str


def describe(settings: Any, prefix: str = "") -> list[Setting]:
    """All settings of a dataclass instance with the docstrings under their fields, in order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(type(settings)))).body[0]
    assert isinstance(tree, ast.ClassDef)
    about: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            about[field.target.id] = " ".join(str(text.value.value).split())
    found: list[Setting] = []
    for each in fields(settings):
        value = getattr(settings, each.name)
        if is_dataclass(value):
            found += describe(value, f"{prefix}{each.name}.")
        else:
            found.append(Setting(prefix + each.name, value, about[each.name]))
    return found
