"""YAML as text: a scalar without quotes stays the word that was written until somebody knows what it should be.

`name: 007`, `name: no` and `name: on` are names where a name is wanted, `lr: 1e-6` and `batch: 4e0` numbers where a
number is (config/settings.py decides by the field's type). Refused with name and line: a key given twice, tags, trees
that are nested too deeply, and aliases that multiply a few hundred bytes into gigabytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, needs, require
from .text import read_text

if TYPE_CHECKING:
    import yaml

DEEPEST = 64
"""Tables and lists inside each other."""
MOST = 100_000
"""Values of one file, those that aliases repeat counted each time."""
LARGEST = 4 << 20
"""Bytes of a file."""

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TEXT_TAG, _KNOWN_TAGS = "tag:yaml.org,2002:str", ("int", "float", "bool", "null", "map", "seq")


class Plain(str):
    """A scalar that stood without quotes: what it means is still open."""


def meant(text: Plain) -> str | int | float | bool:
    """What a plain scalar means by itself (YAML 1.2, with numbers as JSON has them, so `007` stays text)."""
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text) and len(text) < 400:
        return int(text)
    if _FLOAT.fullmatch(text) and not (text.lstrip("+-").isdigit()):
        return float(text)
    special = _SPECIAL.fullmatch(text)
    if special:
        return float("nan") if special[3] else float(f"{special[1]}inf")
    return str(text)


def settled(value: object) -> object:
    """`value` with every plain scalar in it as what it means by itself, for those who take any value."""
    if isinstance(value, Plain):
        return meant(value)
    if isinstance(value, Mapping):
        return {key: settled(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [settled(each) for each in value]
    return value


def read_yaml(path: str | os.PathLike[str], largest: int = LARGEST, *, hint: str = "", nulls: bool = True) -> object:
    """The tree in a YAML file: dicts with text as keys, lists, `str` where there were quotes, None, :class:`Plain`.

    An empty file is None. With ``nulls=False`` `null`, `~` and nothing are texts too, for a reader to whom all values
    are. `hint` ends the message about what is no YAML. Raises UserError naming file and line.
    """
    return parse_yaml(read_text(path, largest), str(Path(path)), hint, nulls)


def parse_yaml(text: str, origin: str, hint: str = "", nulls: bool = True) -> object:
    """:func:`read_yaml` of a text; `origin` opens each error."""
    require("yaml", "train")
    with needs("train"):
        import yaml

    try:
        return _build(yaml.parse(text, Loader=yaml.SafeLoader), origin, nulls)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # ReaderError has none
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or error
        raise UserError(f"{origin}: not valid YAML{line}: {problem}{hint}") from None


def dump_yaml(value: object) -> str:
    """A tree as YAML, keys in their order; :class:`Plain` is written as it stood, other text so that it stays text."""
    require("yaml", "train")
    with needs("train"):
        import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # no stubs
        def ignore_aliases(self, data: object) -> bool:
            return True

    def plain(dumper: yaml.SafeDumper, data: Plain) -> yaml.ScalarNode:
        tag = dumper.resolve(yaml.ScalarNode, str(data), (True, False))
        node: yaml.ScalarNode = dumper.represent_scalar(tag, str(data))
        return node

    def text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
        number = not isinstance(meant(Plain(data)), str)
        node: yaml.ScalarNode = dumper.represent_scalar(_TEXT_TAG, data, style="'" if number else None)
        return node

    Dumper.add_representer(Plain, plain)
    Dumper.add_representer(str, text)
    dumped: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return dumped


@dataclass
class _Open:
    """A table or list that is being read."""

    value: dict[str, object] | list[object]
    anchor: str | None
    size: int = 1
    key: str | None = None
    """The key whose value comes next."""
    lines: dict[str, int] = field(default_factory=dict)
    merged: list[dict[str, object]] = field(default_factory=list)


def _build(events: Iterable[yaml.Event], origin: str, nulls: bool) -> object:
    """The tree of a stream of events, without recursion: a file decides neither our stack nor our memory."""
    with needs("train"):
        import yaml

    stack: list[_Open] = []
    anchors: dict[str, tuple[object, int]] = {}
    top: list[object] = []
    total = documents = 0

    def fail(event: yaml.Event, problem: str) -> UserError:
        return UserError(f"{origin}: line {event.start_mark.line + 1}: {problem}")

    def put(event: yaml.Event, value: object, size: int) -> None:
        nonlocal total
        total += size
        if total > MOST:
            raise fail(event, f"more than {MOST} values: this is too large (do aliases multiply it?)")
        if not stack:
            top.append(value)
            return
        parent = stack[-1]
        parent.size += size
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is None:
            if not isinstance(value, str) and value is not None:
                raise fail(event, "a key must be a word")
            key = "null" if value is None else str(value)
            if key in parent.lines:
                raise fail(event, f"{key!r} is given twice, first in line {parent.lines[key]}: leave one of them")
            parent.key, parent.lines[key] = key, event.start_mark.line + 1
        else:
            key, parent.key = parent.key, None
            if key == "<<":
                parts = value if isinstance(value, list) else [value]
                tables = [part for part in parts if isinstance(part, dict)]
                if len(tables) != len(parts):
                    raise fail(event, "<< merges tables alone")
                parent.merged += tables
            else:
                parent.value[key] = value

    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise fail(event, "a second document begins: give one")
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                line = event.start_mark.line + 1
                problem = f"*{event.anchor} stands for nothing before it (a text that begins with * wants quotes)"
                raise UserError(f"{origin}: not valid YAML at line {line}: {problem}")
            put(event, *anchors[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            scalar = _scalar(event, fail, nulls)
            if event.anchor:
                anchors[event.anchor] = (scalar, 1)
            put(event, scalar, 1)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            _known(event, fail)
            if len(stack) == DEEPEST:
                raise fail(event, f"nested more than {DEEPEST} deep")
            if stack and isinstance(stack[-1].value, dict) and stack[-1].key is None:
                raise fail(event, "a key must be a word")
            stack.append(_Open({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            done = stack.pop()
            for table in done.merged:
                assert isinstance(done.value, dict)
                done.value = {**table, **done.value}
            if done.anchor:
                anchors[done.anchor] = (done.value, done.size)
            size, total = done.size, total - done.size + 1  # its parts are counted again with it
            put(event, done.value, size)
    return top[0] if top else None


def _scalar(event: yaml.ScalarEvent, fail: Callable[[yaml.Event, str], UserError], nulls: bool) -> str | None:
    _known(event, fail)
    quoted = event.style not in (None, "") or event.tag in ("!", _TEXT_TAG)
    if quoted:
        return str(event.value)
    return None if nulls and event.value in _NULLS else Plain(event.value)


def _known(event: yaml.NodeEvent, fail: Callable[[yaml.Event, str], UserError]) -> None:
    tag = getattr(event, "tag", None)
    if tag in (None, "!", _TEXT_TAG) or str(tag).removeprefix("tag:yaml.org,2002:") in _KNOWN_TAGS:
        return
    raise fail(event, f"the tag {tag} is not understood: leave it out")
