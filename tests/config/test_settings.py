"""The one converter: what a word, a YAML scalar and a JSON value become, by the type of the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pyunictokens.config.settings import from_mapping, load_yaml, save_yaml, to_mapping, with_overrides
from pyunictokens.utils.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["auto", "off", "on"] = "auto"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise UserError(f"rate={self.rate}: must be ≥ 0")


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    where: Path = Path(".")
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)
    weights: Mapping[str, float] | Mapping[str, Mapping[str, float]] | None = None
    rewards: str | Mapping[str, object] | None = None
    inner: Inner = field(default_factory=Inner)


def read(text: str, tmp_path: Path) -> Outer:
    file = tmp_path / "f.yaml"
    file.write_text(text, encoding="utf-8")
    return from_mapping(Outer, load_yaml(file), origin="f.yaml")


@pytest.mark.parametrize("name", ["no", "on", "007", "1e3", "true", "1.50", "0x1f", "1:30", "2024-01-01", "bo", "12"])
def test_names_that_look_like_something_else(name: str, tmp_path: Path) -> None:
    found = read(f"name: {name}", tmp_path).name
    assert found == name and type(found) is str
    assert with_overrides(Outer("x"), [f"name={name}"]).name == name
    save_yaml(tmp_path / "out.yaml", Outer(name))
    assert from_mapping(Outer, load_yaml(tmp_path / "out.yaml")).name == name


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("4e0", 4), ("4.0", 4), ("1_000", 1000), ("007", 7), ("+3", 3), ("-2", -2),
     ("9007199254740993", 2**53 + 1)],
)  # fmt: skip
def test_whole_numbers(text: str, value: int, tmp_path: Path) -> None:
    assert read(f"name: x\ncount: {text}", tmp_path).count == value
    assert with_overrides(Outer("x"), [f"count={text}"]).count == value
    assert from_mapping(Outer, {"name": "x", "count": text}).count == value


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "0.000001", "1.0e-06"])
def test_numbers(text: str, tmp_path: Path) -> None:
    assert read(f"name: x\ninner: {{rate: {text}}}", tmp_path).inner.rate == 1e-6
    assert with_overrides(Outer("x"), [f"inner.rate={text}"]).inner.rate == 1e-6


def test_every_kind_of_field(tmp_path: Path) -> None:
    made = read(
        "name: x\nflag: yes\nwhere: ~/photos\nlimit: none\nseeds: [1, 2e0]\nweights: {der: 1e0, tier: 2}\n"
        "rewards: {experts: {der: {batch: 4e0, on: no}}}\ninner: {kind: on}\n",
        tmp_path,
    )
    assert made.flag is True and made.where == Path.home() / "photos" and made.limit is None and made.seeds == (1, 2)
    assert made.weights == {"der": 1.0, "tier": 2.0} and made.inner.kind == "on"
    assert made.rewards == {"experts": {"der": {"batch": 4.0, "on": "no"}}}
    assert read("name: x\nweights: {human: {der: 1e0}}", tmp_path).weights == {"human": {"der": 1.0}}
    assert read("name: x\nrewards: tcp://h:1\nlimit: ~", tmp_path).rewards == "tcp://h:1"
    assert math.isinf(read("name: x\ninner: {rate: .inf}", tmp_path).inner.rate)
    assert with_overrides(made, ["seeds=3,4", "flag=off", "rewards=a:b", "limit=null"]) == Outer(
        "x", 1, False, Path.home() / "photos", None, (3, 4), made.weights, "a:b", Inner(kind="on")
    )
    assert from_mapping(Outer, json.loads(json.dumps(to_mapping(made)))) == made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("count: 1", "f.yaml: name is missing"),
        ("name: null", "name=None: must be text .null is no text: write it in quotes."),
        ("name: x\ncount: 2.5", "count=2.5: must be a whole number"),
        ("name: x\ncount: 1e400", "count=inf: must be a whole number"),
        ("name: x\ncount: [1]", r"count=\[1\]: must be a whole number"),
        ("name: x\nflag: 1", "flag=1: must be true or false"),
        ("name: x\nseeds: {a: 1}", "seeds=.*: must be a list"),
        ("name: x\nseeds: [one]", "seeds='one': must be a whole number"),
        ("name: x\nweights: {der: much}", "must be a table|must be a number"),
        ("name: x\ninner: 3", "f.yaml: inner: must be a table of settings, is text"),
        ("name: x\ninner: {rate: -1}", "f.yaml: inner: rate=-1.0: must be ≥ 0"),
        ("name: x\ninner: {kind: maybe}", "kind='maybe': must be one of auto, off, on"),
        ("name: x\ninner: {rat: 1}", "unknown setting 'rat'; did you mean 'rate'"),
        ("name: x\ncount: 1\ncount: 2", "line 3: 'count' is given twice, first in line 2"),
    ],
)
def test_what_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        read(text, tmp_path)


def test_words_are_not_yaml() -> None:
    """A value with a colon, a hash or an @ needs no quotes: only what begins like a list or quotes is read as YAML."""
    for value in ("a: b", "#1", "@home", "50%", "*", "a, b", "ends with ]"):
        assert with_overrides(Outer("x"), [f"name={value}"]).name == value
    assert with_overrides(Outer("x"), ['name="quoted: yes"']).name == "quoted: yes"
    with pytest.raises(UserError, match="not valid YAML"):
        with_overrides(Outer("x"), ["seeds=[1"])
